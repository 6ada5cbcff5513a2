"""The learning-rate schedule: knots, and the shapes against torch's schedulers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.optim import lr_scheduler

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe, recipe_of
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.recipe.schedule import interpolate
from swap_hpc.recipe.training import Refine
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit

WARM_UP = ((0.0, 0.0), (5.0, 1.0), (15.0, 0.0))
EPOCHS = 20  # of a phase

# Builds torch's scheduler, which takes one step per epoch after the warm-up.
Scheduler = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def refine(schedule: Any, epochs: int = EPOCHS) -> Refine:
    return tiny.recipe(refine={"epochs": epochs, "learning_rate": schedule}).refine


@pytest.mark.parametrize(
    ("epoch", "value"), [(-1, 0), (0, 0), (2.5, 0.5), (5, 1), (10, 0.5), (15, 0), (99, 0)]
)
def test_linear_between_knots_and_constant_outside(epoch: float, value: float) -> None:
    assert interpolate(WARM_UP, epoch) == pytest.approx(value)


def test_one_knot_is_a_constant() -> None:
    assert interpolate(((0.0, 0.1),), 7.3) == 0.1


def test_knots_in_epochs_are_interpolated_as_they_are() -> None:
    phase = refine([[0, 0.0], [5, 1.0], [15, 0.0]])
    assert phase.learning_rate == WARM_UP
    for epoch in np.linspace(0, EPOCHS, 777):
        assert phase.rate(float(epoch)) == interpolate(WARM_UP, float(epoch))


@pytest.mark.parametrize("epochs", [1, 7, 30, 90])
def test_knots_in_shares_move_with_the_length(epochs: int) -> None:
    phase = refine([["0%", 0.0], ["10%", 0.1], ["62.5%", 0.03], ["100%", 0.0]], epochs)
    times = np.linspace(0, epochs, 333)
    expected = np.interp(times / epochs, [0, 0.1, 0.625, 1], [0, 0.1, 0.03, 0])
    rates = [phase.rate(float(time)) for time in times]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)


def test_knots_may_mix_epochs_and_shares() -> None:
    assert refine([[0, 0.0], [2, 0.4], ["100%", 0.0]]).rate(11) == pytest.approx(0.2)


def cosine(sgd: torch.optim.Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CosineAnnealingLR(sgd, T_max=epochs, eta_min=0.01)


def linear(sgd: torch.optim.Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LinearLR(sgd, start_factor=1.0, end_factor=0.1, total_iters=epochs)


def step(sgd: torch.optim.Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    begin = EPOCHS - epochs
    return lr_scheduler.MultiStepLR(sgd, milestones=[10 - begin, 15 - begin], gamma=0.3)


def constant(sgd: torch.optim.Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ConstantLR(sgd, factor=1.0)


SHAPES: list[tuple[dict[str, Any], Scheduler]] = [
    ({"shape": "cosine", "end": 0.01}, cosine),
    ({"shape": "linear", "end": 0.01}, linear),
    ({"shape": "step", "at": ["50%", "75%"], "factor": 0.3}, step),
    ({"shape": "constant"}, constant),
]


@pytest.mark.parametrize("warmup", [0, 5, "25%"])
@pytest.mark.parametrize(("table", "scheduler"), SHAPES)
def test_a_shape_is_that_of_torchs_scheduler(
    table: dict[str, Any], scheduler: Scheduler, warmup: float | str
) -> None:
    phase = refine({**table, "peak": 0.1, "warmup": warmup} | ({"start": 0.02} if warmup else {}))
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = scheduler(sgd, EPOCHS - 5 if warmup else EPOCHS)
    if warmup:
        rising = lr_scheduler.LinearLR(sgd, start_factor=0.2, end_factor=1.0, total_iters=5)
        theirs = lr_scheduler.SequentialLR(sgd, [rising, theirs], milestones=[5])
    for epoch in range(EPOCHS + 1):
        assert phase.rate(epoch) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9), epoch
        sgd.step()
        theirs.step()


@pytest.mark.parametrize("length", [3, 11, 200])
@pytest.mark.parametrize("table", [table for table, _ in SHAPES if table["shape"] != "step"])
def test_a_shape_in_shares_stretches_with_the_phase(table: dict[str, Any], length: int) -> None:
    table = {**table, "peak": 0.1, "warmup": "30%"}
    for share in np.linspace(0, 1, 101):
        stretched = refine(table, length).rate(float(share) * length)
        assert stretched == pytest.approx(refine(table, 10).rate(float(share) * 10), rel=1e-9)


def test_a_shape_between_epochs() -> None:
    """Every step of training has a rate of its own; a schedule steps down at the very time."""
    assert refine({"shape": "cosine", "peak": 0.1}, 1).rate(1 / 3) == pytest.approx(0.075)
    steps = refine({"shape": "step", "peak": 1.0, "at": ["50%", "75%"], "warmup": 2})
    assert [steps.rate(x) for x in (1.0, 9.999, 10, 14.999, 15)] == pytest.approx(
        [0.5, 1, 0.1, 0.1, 0.01]
    )


def test_an_epochs_line_has_the_rate_before_a_step() -> None:
    step = {"shape": "step", "peak": 0.01, "at": [1], "factor": 0.5}
    job = tiny.job(refine={"epochs": 2, "learning_rate": step})
    events = list(fit(tiny.model(job), job, refinement_of(0), Team.alone()))
    rates = [event.learning_rate for event in events if isinstance(event, Epoch)]
    assert rates == [0.01, 0.005]
    late = refine({"shape": "step", "peak": 1.0, "at": ["50%"], "warmup": 2}, 6)
    assert [late.rate_until(x) for x in (1, 2, 3, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.1])


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_step_in_shares_is_at_its_very_step(percent: int) -> None:
    """The epoch of a step is a sum of floats, its time a product."""
    steps = refine({"shape": "step", "peak": 1.0, "at": [f"{percent}%"]}, 4)
    rates = [steps.rate(epoch + step / 25) for epoch in range(4) for step in range(25)]
    assert [rate == 1 for rate in rates].index(False) == percent


def test_each_cycle_has_the_schedule_anew() -> None:
    cosine = {"shape": "cosine", "peak": 0.01}
    job = tiny.job(refine={"epochs": 2, "cycles": 3, "learning_rate": cosine})
    events = list(fit(tiny.model(job), job, refinement_of(0), Team.alone()))
    rates = [event.learning_rate for event in events if isinstance(event, Epoch)]
    assert rates == pytest.approx([0.005, 0.0] * 3)


@pytest.mark.parametrize("table", [table for table, _ in SHAPES])
def test_a_written_recipe_has_the_same_schedule(table: dict[str, Any]) -> None:
    table = {**table, "peak": 0.1, "warmup": "5%"}
    recipe = tiny.recipe(
        large_batch={"epochs": 30, "learning_rate": table},
        refine={"epochs": 3, "learning_rate": [[0, 0.1], ["100%", 0.0]]},
    )
    assert recipe_of(recipe.to_toml(), "recipe.toml") == recipe


def test_a_field_of_a_table_is_set_alone() -> None:
    whole = 'refine.learning_rate={ shape = "cosine", peak = 0.3, warmup = "5%" }'
    recipe = load_recipe("digits", [whole, "refine.learning_rate.peak=0.2"])
    assert max(recipe.refine.rate(x / 100) for x in range(400)) == pytest.approx(0.2)


WRONG: list[tuple[Any, str]] = [
    ("fast", "refine.learning_rate: needs a number, or pairs"),
    ({"shape": "cubic", "peak": 1}, "or a table: .* shapes: constant, linear, cosine, step"),
    ({"peak": 1}, "shapes: constant, linear, cosine, step"),
    ({"shape": "cosine"}, "refine.learning_rate.peak is missing"),
    (
        {"shape": "cosine", "peak": 1, "factor": 2},
        "unknown field refine.learning_rate.factor; valid here: peak, warmup, start, end, shape",
    ),
    ({"shape": "cosine", "peak": 1, "warmup": "x"}, "learning_rate.warmup: needs finite epochs"),
    ({"shape": "cosine", "peak": 1, "warmup": "101%"}, "learning_rate.warmup: needs finite epochs"),
    ({"shape": "cosine", "peak": 1, "warmup": True}, "learning_rate.warmup: needs a number, not"),
    ({"shape": "linear", "peak": 1, "warmup": 20}, r"learning_rate.warmup = 20.* epochs = 20"),
    ({"shape": "linear", "peak": 1, "warmup": "100%"}, "warmup = 100% .*: give a smaller share"),
    ({"shape": "constant", "peak": 1, "start": 0.1}, "start = 0.1 belongs to a warm-up"),
    ({"shape": "cosine", "peak": 1, "end": 2}, "peak is the highest rate"),
    ({"shape": "step", "peak": 1, "at": []}, "refine.learning_rate.at: "),
    ({"shape": "step", "peak": 1, "at": [20]}, "learning_rate.at needs ascending times"),
    ({"shape": "step", "peak": 1, "at": ["60%", 12]}, "learning_rate.at needs ascending times"),
    ({"shape": "step", "peak": 1, "at": [1], "warmup": 2}, "learning_rate.at needs ascending"),
    ([["60%", 1], [12, 0]], "refine: learning_rate needs .* pairs in ascending order"),
    ([["60%", 1], ["40%", 0]], "refine.learning_rate: needs .* ascending order"),
    ([["60 %", 1]], r"refine.learning_rate \(item 1 of item 1\): needs finite epochs"),
]


@pytest.mark.parametrize(("schedule", "message"), WRONG)
def test_a_wrong_schedule_is_named(schedule: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        refine(schedule)
    assert "\n" not in str(error.value) and "<" not in str(error.value)


def test_a_skipped_phase_may_have_any_schedule() -> None:
    assert refine({"shape": "linear", "peak": 1, "warmup": 20}, 0).epochs == 0
