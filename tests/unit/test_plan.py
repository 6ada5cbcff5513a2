"""Predictions: the cost model, and the costs that a calibration finds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from swap_hpc.bench import plan
from swap_hpc.bench.calibration import fit_costs, parse_cost, read_calibration
from swap_hpc.bench.cost_model import Costs, Work, bytes_per_image, epoch_seconds, predict
from swap_hpc.errors import UserError
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.schema import Checkpoint

RECIPE = tiny.recipe(
    groups=2,
    large_batch={"batch_size": 64, "epochs": 3, "learning_rate": 0.1},
    refine={"batch_size": 16, "epochs": 2, "learning_rate": 0.1},
)
WORK = Work(RECIPE, samples=640, parameters=1000)
COSTS = Costs(sample=0.01, step=0.1, latency=0.001, bandwidth=1e6, disk=1e6)


def test_one_rank_computes_and_sends_nothing() -> None:
    seconds = predict(WORK, COSTS, 1)
    assert seconds["large_batch"] == pytest.approx(3 * (640 * 0.01 + 10 * 0.1))
    assert seconds["refine"] == pytest.approx(2 * 2 * (640 * 0.01 + 40 * 0.1))  # two groups in turn
    assert seconds["average"] == 0
    assert seconds["save"] == pytest.approx((3 + 2 * 2) * 8000 / 1e6)


def test_two_ranks_share_phase_1_and_refine_alone() -> None:
    seconds = predict(WORK, COSTS, 2)
    allreduce = 2 * (0.001 + 2000 / 1e6)
    assert seconds["large_batch"] == pytest.approx(3 * (320 * 0.01 + 10 * (0.1 + allreduce)))
    assert seconds["refine"] == pytest.approx(2 * (640 * 0.01 + 40 * 0.1))
    assert seconds["average"] == pytest.approx(2 * (0.001 + 4000 / 1e6))
    assert seconds["batchnorm"] == pytest.approx(2 * 20 * 0.01 / 3)  # two of the four batches of 20


def test_peers_average_and_whole_batches_are_dealt_out() -> None:
    """Eight ranks in two groups: two peers average; with four batches, four ranks have none."""
    seconds = predict(WORK, COSTS, 8)
    assert seconds["average"] == predict(WORK, COSTS, 2)["average"]
    assert seconds["batchnorm"] == pytest.approx(20 * 0.01 / 3)


@pytest.mark.parametrize(
    ("seconds", "saves"),
    [
        (7.0, 100),  # every 2nd epoch
        (3.0, 50),  # two epochs take 6 s: every 4th
        (0.1, 2),  # every 100th
        (0.0, 100),
    ],
)
def test_short_epochs_make_saves_rare(seconds: float, saves: int) -> None:
    assert Checkpoint(epochs=2, min_seconds=10).saves(200, seconds) == saves


def test_saves_can_be_off_or_at_every_epoch() -> None:
    assert Checkpoint(epochs=0).saves(200, 1.0) == 0
    assert Checkpoint(min_seconds=0).saves(200, 0.01) == 200


def test_saves_are_as_rare_as_the_recipe_asks() -> None:
    every_second = RECIPE.checkpoint.model_copy(update={"epochs": 2})
    recipe = RECIPE.model_copy(update={"checkpoint": every_second})
    seconds = predict(Work(recipe, 640, 1000), COSTS, 2)
    assert seconds["save"] == pytest.approx((1 + 1 * 2) * 8000 / 1e6)


def test_ranks_beyond_the_cores_share_them() -> None:
    on_two = predict(WORK, Costs(0.01, 0.1, cores=2), 2)
    on_four = predict(WORK, Costs(0.01, 0.1, cores=2), 4)
    assert on_four["refine"] > on_two["refine"] > predict(WORK, Costs(0.01, 0.1), 4)["refine"]


def test_an_allreduce_of_many_ranks_is_a_tree() -> None:
    ring = 2 * 1023 * (0.001 + 8 / 1024 / 1e6)
    tree = 20 * (0.001 + 8 / 1e6)
    assert COSTS.allreduce(8, 1024) == pytest.approx(tree) and tree < ring


def test_an_allreduce_of_many_bytes_is_a_ring() -> None:
    assert COSTS.allreduce(1e9, 4) == pytest.approx(6 * (0.001 + 250))


def test_phase_2_sends_only_inside_groups() -> None:
    assert bytes_per_image(WORK, 2) == {"large_batch": 4000 / 64, "refine": 0}
    assert bytes_per_image(WORK, 4)["refine"] == 4000 / 16


def case(
    ranks: int, width: int, samples: int, costs: Costs, parameters: int, slower: float
) -> dict[str, Any]:
    """Return what `bench scaling` would measure on a machine with these costs.

    A sample of the case's model takes `slower` times as long as `costs.sample`.
    """
    work = Work(RECIPE.model_copy(update={"groups": ranks}), samples, parameters)
    costs = replace(costs, sample=costs.sample * slower, growth=costs.growth * slower)
    large_batch = epoch_seconds(work, costs, RECIPE.large_batch, ranks, ranks)
    refine = epoch_seconds(work, costs, RECIPE.refine, 1, ranks)
    return {
        "ranks": ranks,
        "width": width,
        "samples": samples,
        "parameters": parameters,
        "phases": {"large_batch": {"seconds": large_batch}, "refine": {"seconds": refine}},
        "batch_sizes": {"large_batch": 64, "refine": 16},
    }


def test_a_calibration_finds_the_costs_that_made_the_measurements() -> None:
    made = [
        case(1, 8, 640, COSTS, 1000, 1),
        case(2, 8, 640, COSTS, 1000, 1),
        case(2, 16, 640, COSTS, 4000, 3.5),
        case(2, 8, 1280, COSTS, 1000, 1),
    ]
    found = fit_costs(made, cores=2)
    for name in ("sample", "step", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert found.cores == 2


def test_a_calibration_finds_that_large_steps_outgrow_the_caches() -> None:
    costs = replace(COSTS, step=0.0, growth=0.002, small=16, large=64)
    made = [
        case(1, 8, 640, costs, 1000, 1),
        case(2, 8, 640, costs, 1000, 1),
        case(2, 16, 640, costs, 4000, 3.5),
    ]
    found = fit_costs(made, cores=2)
    for name in ("sample", "step", "growth", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=1e-6), name


SCALING = Path(__file__).parents[1] / "runs" / "scaling" / "scaling.json"
MEASURED = json.loads(SCALING.read_text(encoding="utf-8"))["cases"]


def test_the_committed_measurements_go_beyond_two_ranks() -> None:
    assert [case["ranks"] for case in MEASURED if case["ranks"] > 2] == [4, 8]


@pytest.mark.parametrize(
    "measured",
    [case for case in MEASURED if case["ranks"] > 2],
    ids=lambda case: f"{case['ranks']} ranks",
)
@pytest.mark.parametrize("phase", ["large_batch", "refine"])
def test_calibrated_on_one_and_two_ranks_it_predicts_more(
    measured: dict[str, Any], phase: str
) -> None:
    """Each phase that `bench scaling` measured on two cores is predicted within a quarter."""
    ranks = measured["ranks"]
    sizes = [f"{name}.batch_size={size}" for name, size in measured["batch_sizes"].items()]
    recipe = load_recipe("cifar10-cpu", (f"groups={ranks}", *sizes))
    work = Work(recipe, measured["samples"], measured["parameters"])
    team = ranks if phase == "large_batch" else 1
    costs = read_calibration(SCALING).costs
    predicted = epoch_seconds(work, costs, getattr(recipe, phase), team, ranks)
    assert predicted == pytest.approx(measured["phases"][phase]["seconds"], rel=0.25)


def test_phase_2_sent_nothing_in_any_measurement() -> None:
    assert [case["phases"]["refine"]["bytes"] for case in MEASURED] == [0] * 8


def test_more_ranks_needed_no_more_memory_each() -> None:
    alike = [case for case in MEASURED if (case["width"], case["samples"]) == (8, 4096)]
    memory = {case["ranks"]: case["peak_memory_mib"] for case in alike}
    assert sorted(memory) == [1, 2, 4, 8]
    by_ranks = [memory[ranks] for ranks in sorted(memory)]
    assert by_ranks == sorted(by_ranks, reverse=True)


def test_the_table_names_what_limits_and_what_is_refused() -> None:
    table = plan.table(WORK, COSTS, (2, 32))
    assert "| small batch (16)" in table and "phase 1: computing" in table
    assert "large_batch.batch_size = 16 does not divide by its 32 ranks |" in table


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speed=3", "there are sample, step, growth, "),
        ("sample=fast", "write it as sample=0.001"),
        ("bandwidth=0", "write it as"),
        ("disk=inf", "write it as"),
    ],
)
def test_a_wrong_cost_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_cost(override)
