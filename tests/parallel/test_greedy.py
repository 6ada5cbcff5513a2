"""The greedy average, and predictions, against an independent computation on saved weights."""

import csv
from functools import partial
from pathlib import Path

import fuzz
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data import Arrays, Dataset, load
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import parse
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run import saved
from swap_hpc.run.greedy import greedy_average
from swap_hpc.run.weights import write_tensors

GROUPS = 4


def recipe(**data: int) -> Recipe:
    """Return a recipe without batch norm, so that an average is the mean of weights alone."""
    return parse(
        {
            "groups": GROUPS,
            "device": "cpu",
            "model": {"name": "tiny:plain"},
            "data": {"name": "digits", **data},
            "large_batch": {"batch_size": 48, "epochs": 4, "learning_rate": 0.05},
            "refine": {"batch_size": 24, "epochs": 1, "learning_rate": 0.01},
        }
    )


def states(run: Path) -> list[dict[str, Tensor]]:
    return [load_file(run / f"group-{group:03d}.safetensors") for group in range(GROUPS)]


def make_noisy(run: Path, group: int, size: float) -> None:
    """Give a group the weights of the end of phase 1, and noise: an average loses the noise."""
    file = run / f"group-{group:03d}.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = {k: v for k, v in opened.metadata().items() if k not in ("sha256", "format")}
    torch.manual_seed(group)
    moved = {
        name: t + size * torch.randn_like(t)
        for name, t in load_file(run / "large_batch.safetensors").items()
    }
    write_tensors(file, moved, header)


def logits_of(state: dict[str, Tensor], data: Dataset, split: Arrays) -> Tensor:
    model = tiny.plain(10, 1).eval()
    model.load_state_dict(state)
    images = (torch.from_numpy(split.images).float() - data.mean[0]) / data.std[0]
    with torch.no_grad():
        return model(images.permute(0, 3, 1, 2))


def accuracy(state: dict[str, Tensor], data: Dataset, split: Arrays) -> float:
    right = logits_of(state, data, split).argmax(1) == torch.from_numpy(split.labels)
    return right.double().mean().item()


def mean_of(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    first = members[0]
    stacked = {name: torch.stack([m[name].double() for m in members]) for name in first}
    return {name: tensor.mean(0).to(first[name].dtype) for name, tensor in stacked.items()}


def greedy_by_hand(run: Path, data: Dataset, split: Arrays) -> tuple[list[int], dict[str, Tensor]]:
    found = states(run)
    order = sorted(range(GROUPS), key=lambda g: (-accuracy(found[g], data, split), g))
    members = order[:1]
    for group in order[1:]:
        before = accuracy(mean_of([found[g] for g in members]), data, split)
        after = accuracy(mean_of([found[g] for g in [*members, group]]), data, split)
        members = [*members, group] if after >= before else members
    return members, mean_of([found[g] for g in members])


@pytest.mark.ranks(1, 2, 4)
def test_the_greedy_average_is_that_of_an_independent_computation(
    world: Team, tmp_path: Path
) -> None:
    run = Path(world.broadcast(str(tmp_path))) / "run"
    fuzz.train(recipe(validation=250), run, world)
    # the third is too far away to fit in any average
    for group, size in enumerate((0.1, 0.12, 1.5, 0.1)):
        world.first(partial(make_noisy, run, group, size))
    found = greedy_average(run, None, None, world)
    data = load(recipe(validation=250).data, Team.alone(), 1)
    assert isinstance(data.validation, Arrays) and isinstance(data.test, Arrays)
    members, state = greedy_by_hand(run, data, data.validation)
    assert found.members == tuple(members) and 2 not in members and len(members) > 1
    written = load_file(run / "average-greedy.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    for split in ("validation", "test"):
        expected = accuracy(state, data, getattr(data, split))
        assert found.found[split].accuracy == pytest.approx(expected, abs=1e-12)
    check_predictions(run, data, state, world)
    check_without_validation(run.parent / "two", world)


def check_predictions(run: Path, data: Dataset, state: dict[str, Tensor], world: Team) -> None:
    """All samples are there, in order, with the outputs of the model."""
    table = run / "predictions" / "validation.csv"
    result = saved.evaluate(
        run / "average-greedy.safetensors",
        None,
        world,
        "validation",
        ["evaluate.batch_size=32"],
        predictions=table,
    )
    assert isinstance(data.validation, Arrays)
    expected = logits_of(state, data, data.validation)
    with open(table, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["index", "name", "target", *(f"output_{i}" for i in range(10))]
    assert [int(row[0]) for row in rows] == [*range(250)] and {row[1] for row in rows} == {""}
    assert [int(row[2]) for row in rows] == data.validation.labels.tolist()
    outputs = torch.tensor([[float(each) for each in row[3:]] for row in rows])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(outputs, torch.from_numpy(data.validation.labels)).item()
    assert result.found["validation"].loss == pytest.approx(loss, rel=1e-4)
    world.barrier()
    assert sorted(path.name for path in table.parent.iterdir()) == ["validation.csv"]


def check_without_validation(run: Path, world: Team) -> None:
    fuzz.train(recipe(), run, world)
    with pytest.raises(UserError, match="chooses by validation samples, and the run has none"):
        greedy_average(run, None, None, world)
    with pytest.raises(UserError, match="the run had no validation split, and was trained on all"):
        saved.evaluate(run / "swap.safetensors", None, world, "validation")
