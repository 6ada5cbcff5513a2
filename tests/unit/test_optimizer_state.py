"""Every piece of an optimizer's state is saved, and comes back to the bit."""

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from own_optimizers import Odd
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.data.sampling import Key
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.optimizer import DEFAULTS, Optimizer
from swap_hpc.recipe.phase import PHASE_1, Part
from swap_hpc.run import dry_step as dry_step_module
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.train.events import NoSaves, SavePoint
from swap_hpc.train.fit import fit
from swap_hpc.train.optimizers import build_optimizer, torch_optimizers
from swap_hpc.train.parameter_groups import freeze_
from swap_hpc.train.state import flatten, optimizer_state, restore_optimizer_, unflatten

ONE = Team.alone()
# Muon trains matrices alone.
ONE_MATRIX = {"groups": [{"match": ["[0-8].*", "*.bias"], "frozen": True}]}
GROUPS = {
    "decay_vectors": False,
    "layer_decay": 0.75,
    "groups": [{"match": "9.*", "learning_rate_scale": 2.0, "arguments": {"betas": [0.5, 0.9]}}],
}
OFFERED: list[dict[str, Any]] = [
    *({"name": name} for name in (*DEFAULTS, *torch_optimizers()) if name != "Muon"),
    {"name": "Muon", **ONE_MATRIX},
    {"name": "adamw", **GROUPS},
    {"name": "lamb", **GROUPS},
    {"name": "own_optimizers:Odd", "groups": [{"match": "*.bias", "arguments": {"scale": 0.5}}]},
    {"name": "own_optimizers:Counting"},
]
JOB = tiny.job(model={"name": "tiny:normed"})


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.rand(6, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.eval()(images), labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.step()


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Compare two trees: kinds, types, keys and bits."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{number}")
    else:
        assert one == other, path


def built(fields: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    recipe = Optimizer.model_validate(fields)
    freeze_(model, recipe)
    return build_optimizer(model, recipe)


@pytest.mark.parametrize("fields", OFFERED, ids=[fields["name"] for fields in OFFERED])
def test_all_state_comes_back_and_training_continues_to_the_bit(fields: dict[str, Any]) -> None:
    model = tiny.model(JOB)
    optimizer = built(fields, model)
    stepped(optimizer, model, 3, seed=0)
    state = optimizer_state(optimizer, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if fields["name"] != "SGD":  # has no state without momentum
        assert state["state"].keys() == trained
    description, tensors = flatten(state)
    copies = {path: tensor.clone() for path, tensor in tensors.items()}
    saved = unflatten(json.loads(json.dumps(description)), copies)

    other = tiny.model(JOB)
    other.load_state_dict(model.state_dict())
    resumed = built(fields, other)
    restore_optimizer_(resumed, other, saved)
    assert_same(optimizer.state_dict(), resumed.state_dict())
    stepped(optimizer, model, 3, seed=1)
    stepped(resumed, other, 3, seed=1)
    assert torch.equal(tiny.weights(model), tiny.weights(other))


def test_a_missing_piece_would_be_noticed() -> None:
    """The comparison above and the weights both see a piece of state that is lost."""
    model = tiny.model(JOB)
    optimizer = Odd(model.parameters())
    stepped(optimizer, model, 3, seed=0)
    state = optimizer_state(optimizer, model)
    for lost in ("count", "history", "norm"):
        other = tiny.model(JOB)
        other.load_state_dict(model.state_dict())
        resumed = Odd(other.parameters())
        kept = {
            name: {key: value for key, value in pieces.items() if key != lost}
            for name, pieces in state["state"].items()
        }
        restore_optimizer_(resumed, other, {**state, "state": kept})
        with pytest.raises(AssertionError):
            assert_same(optimizer.state_dict(), resumed.state_dict())


def test_a_run_with_odd_state_resumes_to_the_bit(tmp_path: Path) -> None:
    """Through files: stopped after each save, it ends with the weights of a run that was not."""
    job = tiny.job(model={"name": "tiny:normed"}, optimizer={"name": "own_optimizers:Odd"})
    whole = tiny.model(job)
    for _ in fit(whole, job, PHASE_1, ONE):
        pass
    checkpoints = Checkpoints(tmp_path, job.recipe)

    class Saves(NoSaves):
        def load(self, part: Part, team: Team) -> SavePoint | None:
            saved = checkpoints.load(part, team)
            return saved.point if saved else None

    starts, ended = 0, False
    while not ended:
        model = tiny.model(job)
        for event in fit(model, job, PHASE_1, ONE, Saves()):
            ended = isinstance(event, SavePoint) and event.ended
            if isinstance(event, SavePoint) and event.due:
                checkpoints.save(event, {}, ONE)
                break
        starts += 1
    assert starts == job.recipe.large_batch.epochs
    assert torch.equal(tiny.weights(model), tiny.weights(whole))


def test_what_a_file_cannot_hold_is_refused_with_its_place() -> None:
    model = tiny.model(JOB)
    optimizer = Odd(model.parameters())
    stepped(optimizer, model, 1, seed=0)
    optimizer.state[next(model.parameters())]["history"]["queue"] = collections.deque([1.0])
    message = "the optimizer keeps a deque at 0.weight/history/queue, which a checkpoint cannot"
    with pytest.raises(UserError, match=message):
        flatten(optimizer_state(optimizer, model))


def test_no_two_places_of_a_tree_share_a_path() -> None:
    keys: list[Any] = ["a/b", "1", 1, "#1", "~1", "~", "/", "", None, "#None", 1.5, True]
    tree: dict[Any, Any] = {key: torch.tensor(float(number)) for number, key in enumerate(keys)}
    tree |= {"a": {"b": torch.tensor(99.0)}, "nested": [{"x": torch.tensor(98.0)}]}
    description, tensors = flatten(tree)
    assert_same(unflatten(json.loads(json.dumps(description)), tensors), tree)


def test_a_shared_tensor_is_shared_again() -> None:
    """An optimizer that counts in one tensor for two parameters goes on counting in one."""
    model = tiny.model(JOB)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, second, *_ = model.parameters()
    optimizer.state[first]["count"] = optimizer.state[second]["count"] = torch.zeros(())
    description, tensors = flatten(optimizer_state(optimizer, model))
    assert len(tensors) == 1
    resumed = torch.optim.SGD(model.parameters(), lr=0.0)
    restore_optimizer_(resumed, model, unflatten(description, tensors))
    assert resumed.state[first]["count"] is resumed.state[second]["count"]


def test_the_dry_step_refuses_it_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Queued(Odd):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for kept in self.state.values():
                kept["queue"] = collections.deque([1.0])

    monkeypatch.setattr(
        dry_step_module, "build_optimizer", lambda model, recipe: Queued(model.parameters())
    )
    key = Key.of(JOB.recipe.seed, PHASE_1)
    with pytest.raises(UserError, match="the optimizer keeps a deque at 0.weight/queue"):
        dry_step_module.dry_step(tiny.model(JOB), JOB, JOB.recipe.large_batch, key, ONE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Muon"}, "the optimizer Muon: Muon only supports 2D parameters"),
        (
            {"name": "adamw", "arguments": {"betas": [0.9]}},
            "the optimizer adamw: tuple index out of range",
        ),
        (
            {"name": "adamw", "arguments": {"capturable": True}},
            "^the optimizer adamw fails in its first step: AssertionError: If capturable=True",
        ),
        (
            {"name": "own_optimizers:Fixed"},
            "own_optimizers:Fixed moves the weights at a learning rate of 0: it does not read",
        ),
    ],
)
def test_the_dry_step_refuses_an_optimizer_that_cannot_train_the_model(
    fields: dict[str, Any], message: str
) -> None:
    job = tiny.job(optimizer=fields)
    key = Key.of(0, PHASE_1)
    with pytest.raises(UserError, match=message):
        dry_step_module.dry_step(tiny.model(job), job, job.recipe.large_batch, key, ONE)


@pytest.mark.parametrize(
    ("name", "is_warned_of"),
    [("Forgetful", True), ("Careless", True), ("Counting", False), ("Noisy", False)],
)
def test_attributes_that_are_not_saved_are_warned_of(name: str, is_warned_of: bool) -> None:
    job = tiny.job(optimizer={"name": f"own_optimizers:{name}"})
    key = Key.of(0, PHASE_1)
    _, warnings = dry_step_module.dry_step(tiny.model(job), job, job.recipe.large_batch, key, ONE)
    found = f"a step changes count of the optimizer own_optimizers:{name}, which is not saved"
    assert [found in warning for warning in warnings] == [True] * is_warned_of
