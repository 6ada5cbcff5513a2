"""A run that is stopped at any step boundary and resumed ends like one that was not stopped."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from swap_hpc.average.agreement import hashed, weights_sha256
from swap_hpc.errors import RunError
from swap_hpc.parallel.grid import Ranks, grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, refinement_of
from swap_hpc.run.checkpoint import Checkpoints, newest_of_all
from swap_hpc.swap import swap
from swap_hpc.train import precision, team_check
from swap_hpc.train.control import Control
from swap_hpc.train.events import (
    Averaged,
    Epoch,
    Event,
    GroupArrived,
    LargeBatchEnded,
    Position,
    Refreshed,
    SavePoint,
)
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job

NORMED: dict[str, Any] = {
    "model": {"name": "tiny:normed"},
    "large_batch": {"ema": 0.8},
    "refine": {"epochs": 2, "cycles": 2, "ema": 0.9},
    "optimizer": {"clip_norm": 1.0},
}  # batch norm and dropout, averages of the weights, clipping


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a team check at every step, which tells whether a save is due."""
    monkeypatch.setattr(team_check, "CHECK_SECONDS", 0.0)


@pytest.fixture
def folder(world: Team, tmp_path: Path) -> Path | None:
    """One folder for all ranks."""
    return Path(world.broadcast(str(tmp_path))) if world else None


def eager(job: Job) -> Job:
    """Return the job with a save due at every team check."""
    return replace(job, control=Control(save_seconds=0.0))


@dataclass
class Record:
    """What a run reports and leaves, without times; records are compared bit for bit."""

    epochs: dict[tuple[Part, int], tuple[Any, ...]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    synced: int = field(default=0, compare=False)  # sync points that the run has passed

    def add(self, event: Event) -> None:
        match event:
            case Epoch():
                facts = (
                    event.train,
                    event.test,
                    event.learning_rate,
                    event.images,
                    event.updates,
                    event.ema,
                )
                self.epochs[event.part, event.epoch] = facts
            case SavePoint() if event.ended and event.ema_weights:
                self.models[f"{event.part.name} ema"] = hashed(event.ema_state).hexdigest()
            case LargeBatchEnded(model):
                self.models["large_batch 0"] = weights_sha256(model)
            case GroupArrived(part, model, sync):
                self.models[f"{part.name} {sync.step}"] = weights_sha256(model)
            case Averaged(model, sync):
                self.models[f"average {sync.step}"] = weights_sha256(model)
            case Refreshed(model, sync):
                self.models[f"batchnorm {sync.step}"] = weights_sha256(model)
                self.synced += 1


@dataclass(frozen=True)
class Saved:
    """The saves of a run, as `train` has them."""

    checkpoints: Checkpoints
    common: Position | None
    synced: int

    def load(self, part: Part, team: Team) -> SavePoint | None:
        saved = self.checkpoints.load(part, team, None if part == PHASE_1 else self.common)
        return saved.point if saved else None


def saves_of(job: Job, ranks: Ranks, checkpoints: Checkpoints, synced: int) -> Saved:
    if not job.recipe.refine.average_every_steps:
        return Saved(checkpoints, None, synced)
    parts = [refinement_of(group) for group in ranks.groups]
    common = checkpoints.common(parts, ranks.world) or Position(-1, 0)
    steps = common.epoch * job.steps(job.recipe.refine) + common.step
    over = [sync for sync in job.sync_points if sync.then == "continue" and sync.step <= steps]
    return Saved(checkpoints, common, len(over))


def run(job: Job, ranks: Ranks, folder: Path, record: Record, stop_at: int | None = None) -> bool:
    """Run `swap()` as `train` does: resume from `folder`, up to save point number `stop_at`.

    Returns whether the run has ended.
    """
    checkpoints = Checkpoints(folder, job.recipe)
    saves = saves_of(job, ranks, checkpoints, record.synced)
    events = swap(tiny.model(job), job, ranks, saves)
    number = 0
    for event in events:
        record.add(event)
        if isinstance(event, SavePoint) and event.due:
            team = ranks.world if event.part == PHASE_1 else ranks.group
            checkpoints.save(event, {}, team)
            number += 1
            if number == stop_at:
                events.close()
                ranks.world.barrier()
                return False
    return True


@pytest.mark.ranks(1, 3)
def test_stopped_at_any_step_it_ends_the_same_to_the_bit(
    world: Team, folder: Path, every_step: None
) -> None:
    job = eager(tiny.job(groups=world.size, **NORMED))
    with grid(world, world.size) as ranks:
        whole = Record()
        assert run(job, ranks, folder / "whole", whole)
        steps = 2 * 4 + 4 * 8  # of both phases: 101 samples in batches of 24 and of 12
        for stop_at in (1, 4, 8, 11, 24, steps):
            parts = Record()
            assert not run(job, ranks, folder / str(stop_at), parts, stop_at)
            assert run(job, ranks, folder / str(stop_at), parts)
            assert parts == whole, f"stopped at save point {stop_at}"


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "lamb"},
        {"name": "own_optimizers:Odd", "arguments": {"scale": 0.5}},
        {
            "name": "adamw",
            "decay_vectors": False,
            "layer_decay": 0.75,
            "groups": [
                {"match": "0.*", "frozen": True},
                {"match": "9.*", "learning_rate_scale": 2.0, "arguments": {"betas": [0.5, 0.9]}},
            ],
        },
    ],
    ids=["lamb", "own", "groups"],
)
def test_any_optimizers_state_comes_back(
    world: Team, folder: Path, every_step: None, optimizer: dict[str, Any]
) -> None:
    """Stopped inside the epochs of both phases."""
    job = eager(tiny.job(groups=1, model={"name": "tiny:normed"}, optimizer=optimizer))
    with grid(world, 1) as ranks:
        whole = Record()
        assert run(job, ranks, folder / "whole", whole)
        for stop_at in (2, 7, 11):
            parts = Record()
            assert not run(job, ranks, folder / str(stop_at), parts, stop_at)
            assert run(job, ranks, folder / str(stop_at), parts)
            assert parts == whole, f"stopped at save point {stop_at}"


@pytest.mark.ranks(1, 2)
def test_the_loss_scale_of_fp16_comes_back(
    world: Team, folder: Path, every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between steps that overflow, and inside an interval of growth."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**21)
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    phases = {"large_batch": {"epochs": 2}, "refine": {"batch_size": 24, "epochs": 2}}
    job = eager(tiny.job(precision="fp16", loss="zoo:spiky_loss", **phases))
    with grid(world, 1) as ranks:
        whole = Record()
        assert run(job, ranks, folder / "whole", whole)
        updates = [facts[4] for facts in whole.epochs.values()]
        assert updates[0].skipped and {each.loss_scale for each in updates} != {2.0**21}
        for stop_at in (1, 2, 3, 7, 10, 11):
            parts = Record()
            assert not run(job, ranks, folder / str(stop_at), parts, stop_at)
            assert run(job, ranks, folder / str(stop_at), parts)
            assert parts == whole, f"stopped at save point {stop_at}"


def test_stopped_again_and_again_it_ends_the_same(
    world: Team, folder: Path, every_step: None
) -> None:
    """Every start does three steps, with sync points on the way.

    Groups have two ranks where the number of ranks is even; otherwise a rank has two groups.
    """
    layout = 2 if world.size % 2 == 0 else 2 * world.size
    job = eager(
        tiny.job(
            groups=layout,
            model={"name": "tiny:normed"},
            refine={"epochs": 2, "evaluate_average": 1},
        )
    )
    with grid(world, layout) as ranks:
        whole, parts = Record(), Record()
        assert run(job, ranks, folder / "whole", whole)
        starts = 1
        while not run(job, ranks, folder / "parts", parts, stop_at=3):
            starts += 1
            assert starts < 100
        assert parts == whole and starts > 8


def test_groups_that_go_on_from_their_average_come_back_to_one_step(
    world: Team, folder: Path
) -> None:
    """The end is the same bit for bit, also with stops between the saves of a rank's two groups."""
    layout = 2 if world.size % 2 == 0 else 2 * world.size
    job = eager(
        tiny.job(
            groups=layout,
            model={"name": "tiny:normed"},
            refine={"epochs": 3, "average_every_steps": 5},
        )
    )
    with grid(world, layout) as ranks:
        whole, parts = Record(), Record()
        assert run(job, ranks, folder / "whole", whole)
        starts = 1
        while not run(job, ranks, folder / "parts", parts, stop_at=3):
            starts += 1
            assert starts < 30
        assert parts == whole and starts > 2


def test_another_number_of_ranks_goes_on_with_the_same_samples_and_sums(
    world: Team, folder: Path, every_step: None
) -> None:
    """All ranks save inside an epoch of each phase; one rank alone continues."""
    job = eager(tiny.job(groups=1, refine={"epochs": 1, "batch_size": 24}))
    for stop_at in (2, 6, 10):  # of 8 steps in phase 1 and 4 in phase 2
        with grid(world, 1) as ranks, grid(Team.alone(), 1) as one:
            begun, whole = Record(), Record()
            run(job, ranks, folder / str(stop_at), begun, stop_at)
            if world.rank == 0:
                run(job, one, folder / str(stop_at), begun)
                run(job, one, folder / f"whole-{stop_at}", whole)
            world.barrier()
        assert begun.epochs.keys() >= whole.epochs.keys()
        for key, (train, test, *rest) in whole.epochs.items():
            found = begun.epochs[key]
            assert found[0].loss == pytest.approx(train.loss, rel=1e-4) and found[
                0
            ].accuracy == pytest.approx(train.accuracy, abs=0.02)
            assert found[1].loss == pytest.approx(test.loss, rel=1e-4) and list(found[2:]) == rest


@pytest.mark.ranks(2, 4)
def test_batch_norm_statistics_of_each_rank_come_back(
    world: Team, folder: Path, every_step: None
) -> None:
    job = eager(tiny.job(model={"name": "tiny:normed"}, large_batch={"ema": 0.5}))
    checkpoints = Checkpoints(folder, job.recipe)
    events = fit(tiny.model(job), job, PHASE_1, world)
    point = next(event for event in events if isinstance(event, SavePoint) and event.at.step == 2)
    mine = {name: t.clone() for name, t in point.buffers.items()}
    averages = {name: t.clone() for name, t in point.ema_buffers.items()}
    checkpoints.save(point, {"a": 1}, world)
    events.close()
    there = world.allgather(mine["1.running_mean"])
    assert not torch.equal(there[0], there[1])  # each rank saw its share of the batch
    saved = checkpoints.load(PHASE_1, world)
    assert saved and saved.notes == {"a": 1} and saved.point.running == point.running
    assert all(torch.equal(saved.point.buffers[name], t) for name, t in mine.items())
    assert saved.point.ema_buffers.keys() == averages.keys()
    assert all(torch.equal(saved.point.ema_buffers[name], t) for name, t in averages.items())
    alone = Checkpoints(folder, job.recipe).load(PHASE_1, Team.alone())
    assert alone
    torch.testing.assert_close(
        alone.point.buffers["1.running_mean"],
        torch.stack(there).double().mean(0).float(),
        rtol=0,
        atol=0,
    )
    everyones = torch.stack(world.allgather(averages["1.running_mean"]))
    assert not torch.equal(everyones[0], everyones[1])
    mean = everyones.double().mean(0).float()
    assert torch.equal(alone.point.ema_buffers["1.running_mean"], mean)
    assert alone.point.running.samples == 2 * 24


def test_one_rank_that_is_asked_stops_all_at_the_same_step(world: Team, every_step: None) -> None:
    job = tiny.job()
    control = job.control

    def watched() -> Iterator[Epoch | SavePoint]:
        for event in fit(tiny.model(job), job, PHASE_1, world):
            yield event
            if isinstance(event, Epoch) and world.rank == world.size - 1:
                control.stop = True

    points = [event.at for event in watched() if isinstance(event, SavePoint) and event.due]
    assert points == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    assert world.allgather(points) == [points] * world.size


def test_more_team_checks_change_nothing(
    world: Team, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, records = tiny.job(**NORMED), []
    with grid(world, 1) as ranks:
        for seconds in (0.0, 1e9):
            monkeypatch.setattr(team_check, "CHECK_SECONDS", seconds)
            records.append(Record())
            run(eager(job) if seconds == 0 else job, ranks, folder / str(seconds), records[-1])
    assert records[0] == records[1]


@pytest.mark.ranks(1, 2)
def test_a_moving_average_changes_nothing_of_the_training(world: Team, folder: Path) -> None:
    phases = {"large_batch": {}, "refine": {"epochs": 2, "cycles": 2}}
    jobs = [tiny.job(groups=1, **NORMED), tiny.job(groups=1, **NORMED | phases)]
    records = [Record(), Record()]
    with grid(world, 1) as ranks:
        for number, (job, record) in enumerate(zip(jobs, records, strict=True)):
            run(job, ranks, folder / str(number), record)
    averages = {"large_batch ema", "group-000 ema"}
    assert records[0].models.keys() - records[1].models.keys() == averages
    assert {name: records[0].models[name] for name in records[1].models} == records[1].models
    assert len({*records[0].models.values()}) == len(records[0].models)
    for key, (*facts, ema) in records[1].epochs.items():
        (*others, of_average) = records[0].epochs[key]
        assert others == facts and not ema
        assert of_average["test"].loss != facts[1].loss


def test_evaluating_the_average_on_the_way_changes_nothing(world: Team, folder: Path) -> None:
    """It only adds averages of the groups' weights at that time and of the ends of their cycles."""
    jobs = [
        tiny.job(
            groups=2 * world.size, refine={"epochs": 2, "cycles": 2, "evaluate_average": every}
        )
        for every in (0, 1)
    ]
    records, averages, copies = [Record(), Record()], [], []
    with grid(world, 2 * world.size) as ranks:
        for job, record in zip(jobs, records, strict=True):
            for event in swap(tiny.model(job), job, ranks):
                record.add(event)
                if job is jobs[0]:
                    continue
                if isinstance(event, Refreshed):
                    averages.append(tiny.weights(event.model))
                elif isinstance(event, GroupArrived):
                    copies.append(tiny.weights(event.model))
    ends = [
        {name: digest for name, digest in record.models.items() if name.split()[1] in ("0", "32")}
        for record in records
    ]
    assert records[0].epochs == records[1].epochs and ends[0] == ends[1] and len(ends[0]) == 5
    assert len(averages) == 4
    everyones = [
        torch.stack(copies)[k : k + 2] for k in range(0, 8, 2)
    ]  # per sync point, this rank's two groups
    here = [torch.stack([w for part in world.allgather(each) for w in part]) for each in everyones]
    expected: list[Tensor] = [
        here[0].mean(0),
        here[1].mean(0),
        torch.cat([here[1], here[2]]).mean(0),
        torch.cat([here[1], here[3]]).mean(0),
    ]
    for average, wanted in zip(averages, expected, strict=True):
        torch.testing.assert_close(average, wanted, rtol=1e-6, atol=1e-7)


def test_weights_that_are_not_finite_are_never_saved(world: Team, every_step: None) -> None:
    """The loss of the last step was still finite; the weights after it are not."""
    job = eager(tiny.job())
    model = tiny.model(job)
    events = fit(model, job, PHASE_1, world)
    for event in events:
        if isinstance(event, SavePoint) and event.at.step == 1:
            break
    job.control.heartbeat = lambda where: model.get_parameter("0.weight").data.fill_(math.inf)  # type: ignore[method-assign, assignment]
    with pytest.raises(
        RunError,
        match=r"a weight is not finite after large_batch, epoch 1, step 2, "
        r"at a learning rate of 0.0",
    ):
        next(events)


def test_the_newest_position_that_all_ranks_have(world: Team) -> None:
    def found(*positions: Position) -> Position | None:
        return newest_of_all({*positions}, world)

    assert found() is None
    assert found(Position(0, world.rank)) == (Position(0, 0) if world.size == 1 else None)
    mine = [Position(2, world.rank)] * (world.rank > 0)  # newer ones, each of one rank alone
    assert found(Position(1, 2**31), Position(1, 7), *mine) == Position(1, 2**31)
    behind = world.rank == world.size - 1
    later = [] if behind else [Position(3, 0), Position(2, 9)]
    assert found(Position(1, 5), *later) == (Position(1, 5))
