"""Several ranks train as one rank does."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from mpi4py import MPI
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.average.sharing import broadcast_weights_
from swap_hpc.data.sampling import Key
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import RunError
from swap_hpc.parallel.gradients import gradient_averaging
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Phase, refinement_of
from swap_hpc.train.control import Control
from swap_hpc.train.evaluation import evaluate, evaluate_job
from swap_hpc.train.events import Epoch, SavePoint
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.metrics import mean_of
from swap_hpc.train.objective import Objective
from swap_hpc.train.optimizers import without_guards

KEY = Key(seed=3, phase=Phase.LARGE_BATCH)


def only_epochs(events: Iterable[Epoch | SavePoint]) -> list[Epoch]:
    return [event for event in events if isinstance(event, Epoch)]


def test_horovods_gradients_are_the_plain_mean(world: Team) -> None:
    job = tiny.job()
    model, alone = tiny.model(job), tiny.model(job)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    labels = torch.arange(6) % 3
    F.cross_entropy(alone(images), labels).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradient_averaging(model, world, tiny.CPU) as average_gradients:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        average_gradients()
        optimizer.step()
    for start, now, p in zip(before, model.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None
        mean = MPI.COMM_WORLD.allreduce(p.grad.double().numpy(), MPI.SUM) / world.size
        torch.testing.assert_close(
            (start - now.detach()).double(), torch.from_numpy(mean), rtol=1e-5, atol=1e-7
        )


@pytest.mark.ranks(1, 2)
def test_a_training_that_was_left_does_not_end_the_next_ones_horovod(world: Team) -> None:
    """A failed generator stays suspended until its traceback is freed, at any time, on any rank."""
    job = tiny.job()
    alone, model = tiny.model(job), tiny.model(job)
    list(fit(alone, job, PHASE_1, world))
    left = fit(tiny.model(job), job, PHASE_1, world)
    next(left)
    events = fit(model, job, PHASE_1, world)
    next(events)
    if world.rank == world.size - 1:
        left.close()
    list(events)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
    )


@pytest.mark.ranks(2)
def test_a_step_of_a_training_whose_horovod_another_has_is_refused(world: Team) -> None:
    job = tiny.job()
    left = fit(tiny.model(job), job, PHASE_1, world)
    next(left)
    events = fit(tiny.model(job), job, PHASE_1, world)
    next(events)
    with pytest.raises(RunError, match="another training of this process has begun since"):
        list(left)
    list(events)


def test_training_starts_from_the_first_ranks_weights(world: Team) -> None:
    job = tiny.job(model={"name": "tiny:normed"}, large_batch={"epochs": 1})
    model, expected = tiny.model(job), tiny.model(job)
    for each in (model, expected):
        each.register_buffer("small", torch.arange(3).bfloat16())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(world.rank)
    broadcast_weights_(model, world)
    assert torch.equal(tiny.weights(model), tiny.weights(expected))
    with torch.no_grad():
        model.get_parameter("0.weight").add_(world.rank)
    list(fit(model, job, PHASE_1, world))  # which does it by itself
    assert all(
        torch.equal(tiny.weights(model), other) for other in world.allgather(tiny.weights(model))
    )


def test_a_model_from_a_file_is_the_first_ranks_too(world: Team) -> None:
    job = tiny.job(
        model={"name": "tiny:normed", "weights": "on a disk of each node's own"},
        large_batch={"epochs": 0},
    )
    model = tiny.model(job)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(world.rank)
    list(fit(model, job, PHASE_1, world))
    assert torch.equal(tiny.weights(model), tiny.weights(tiny.model(job)))


def test_groups_that_wait_for_each_other_have_saved() -> None:
    job = tiny.job(refine={"epochs": 4, "evaluate_average": 2}, checkpoint={"epochs": 0})
    events = fit(tiny.model(job), job, refinement_of(0), Team.alone())
    assert [(e.at.epoch, e.due) for e in events if isinstance(e, SavePoint)] == [
        (0, False),
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("busy", [True, False])
def test_saves_of_short_epochs_are_apart(busy: bool, world: Team) -> None:
    """All ranks save when one finds that it is time; the end of a phase is always saved."""
    job = tiny.job(large_batch={"epochs": 3})
    rests = 1e6 if busy or world.rank else 0.0
    job = replace(job, control=Control(min_seconds=rests))
    events = fit(tiny.model(job), job, PHASE_1, world)
    saves = [e.at.epoch for e in events if isinstance(e, SavePoint) and e.due]
    assert saves == ([3] if busy else [1, 2, 3])


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    "fields",
    [{"channels_last": True}, {"optimizer": {"fused": True}}],
    ids=["channels_last", "fused"],
)
def test_faster_ways_round_differently_and_no_more(fields: dict[str, Any], world: Team) -> None:
    jobs = [tiny.job(model={"name": "tiny:batch_normed"}, **more) for more in (fields, {})]
    models = [job.build() for job in jobs]
    if "channels_last" in fields:
        assert models[0].get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    for job, model in zip(jobs, models, strict=True):
        list(fit(model, job, PHASE_1, world))
    torch.testing.assert_close(
        tiny.weights(models[0]), tiny.weights(models[1]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.ranks(1, 2)
def test_the_next_batch_is_fetched_while_gradients_are_averaged(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch of an epoch is not: an evaluation comes before, and its size may differ."""
    done: list[str] = []
    sgd = without_guards(torch.optim.SGD)
    plain_batches, plain_step = Job.training_batches, sgd.step

    def batches(job: Job, *arguments: Any) -> Iterator[Batch]:
        for batch in plain_batches(job, *arguments):
            done.append("batch")
            yield batch

    def step(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        done.append("step")
        plain_step(optimizer, *arguments)

    monkeypatch.setattr(Job, "training_batches", batches)
    monkeypatch.setattr(sgd, "step", step)
    job = tiny.job(large_batch={"epochs": 2})
    list(fit(tiny.model(job), job, PHASE_1, world))
    steps = job.steps(job.recipe.large_batch)
    epoch = ["batch", *["batch", "step"] * (steps - 1), "step"]
    assert steps > 2 and done == 2 * epoch


def test_ranks_give_one_ranks_weights(world: Team) -> None:
    job = tiny.job(large_batch={"epochs": 3})
    together, alone = tiny.model(job), tiny.model(job)
    epochs = only_epochs(fit(together, job, PHASE_1, world))
    reference = only_epochs(fit(alone, job, PHASE_1, Team.alone()))
    torch.testing.assert_close(tiny.weights(together), tiny.weights(alone), rtol=1e-4, atol=1e-6)
    # Training changed the weights.
    assert (tiny.weights(alone) - tiny.weights(tiny.model(job))).abs().max() > 1e-2
    for ours, theirs in zip(epochs, reference, strict=True):
        assert ours.train.accuracy == pytest.approx(theirs.train.accuracy, abs=0.02)
        assert ours.train.loss == pytest.approx(theirs.train.loss, rel=1e-4)
        assert ours.learning_rate == theirs.learning_rate


@pytest.mark.ranks(2)
def test_a_compiled_step_trains_as_a_plain_one_does(world: Team) -> None:
    jobs = [
        tiny.job(model={"name": "tiny:batch_normed"}, compile=wanted) for wanted in (True, False)
    ]
    compiled, plain = (tiny.model(job) for job in jobs)
    for job, model in zip(jobs, (compiled, plain), strict=True):
        list(fit(model, job, PHASE_1, world))
    torch.testing.assert_close(tiny.weights(compiled), tiny.weights(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.ranks(1)
def test_what_was_compiled_before_does_not_matter(world: Team) -> None:
    """A process that resumes in phase 2 compiles the same step as one that trained phase 1."""
    job = tiny.job(model={"name": "tiny:batch_normed"}, compile=True)
    fresh, later = tiny.model(job), tiny.model(job)
    for model, before in ((fresh, False), (later, True)):
        torch._dynamo.reset()
        if before:
            list(fit(tiny.model(job), job, PHASE_1, world))
        list(fit(model, job, refinement_of(0), world))
    assert torch.equal(tiny.weights(fresh), tiny.weights(later))


def test_all_ranks_hold_the_same_weights(world: Team) -> None:
    job = tiny.job(model={"name": "tiny:normed"})
    model = tiny.model(job)
    list(fit(model, job, PHASE_1, world))
    assert all(
        torch.equal(tiny.weights(model), other) for other in world.allgather(tiny.weights(model))
    )


@pytest.mark.ranks(1, 2)
def test_an_evaluation_leaves_the_modes_as_they_were(world: Team) -> None:
    model = tiny.normed(3, 3).train()
    frozen = next(
        module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)
    ).eval()
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
    evaluate(model, batches if world.rank == 0 else [], world)
    assert [module for module in model.modules() if not module.training] == [frozen]
    with pytest.raises(ValueError, match="no rank has a sample to evaluate on"):
        evaluate(model, [], world)


@pytest.mark.ranks(1)
def test_an_evaluations_measures_are_computed_in_float32(world: Team) -> None:
    """Autocast is for the model's forward pass only; on GPUs it forbids some losses."""
    seen = []

    def measured(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs.dtype, torch.is_autocast_enabled("cpu"), (outputs @ outputs.T).dtype))
        return torch.zeros(len(targets))

    job = tiny.job(precision="bf16")
    objective = Objective(
        measured,
        lambda outputs, targets: measured(outputs, targets).sum(),
        (mean_of(measured, "zero"),),
    )
    with job.autocast():
        evaluate(tiny.model(job), job.test_batches(world), world, objective)
    assert set(seen) == {(torch.float32, False, torch.float32)}


def test_evaluation_counts_each_sample_once(world: Team) -> None:
    job = tiny.job(model={"name": "tiny:normed"})  # 37 test samples in batches of 7
    model = tiny.model(job).eval()
    result = evaluate_job(model, job, world)
    assert isinstance(job.dataset.test, Arrays)
    mean, std = torch.tensor(job.dataset.mean), torch.tensor(job.dataset.std)
    images = (torch.from_numpy(job.dataset.test.images) - mean) / std
    with torch.no_grad():
        logits = model(images.float().permute(0, 3, 1, 2))
    labels = torch.from_numpy(job.dataset.test.labels)
    assert result.accuracy == (logits.argmax(1) == labels).sum().item() / 37
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_phase_ends_at_its_training_accuracy(world: Team) -> None:
    job = tiny.job(large_batch={"epochs": 30, "learning_rate": 0.05, "stop_accuracy": 0.7})
    epochs = only_epochs(fit(tiny.model(job), job, PHASE_1, world))
    assert [e.train.accuracy >= 0.7 for e in epochs] == [False] * (len(epochs) - 1) + [True]
    assert epochs[-1].ends_cycle and epochs[-1].test is not None


def test_a_loss_that_is_not_finite_stops_all_ranks(world: Team) -> None:
    job = tiny.job(large_batch={"learning_rate": 1e30})
    with pytest.raises(
        RunError,
        match=r"the loss is (nan|inf) in large_batch, epoch 1, step [1-4], "
        r"at a learning rate of 1e\+30",
    ):
        list(fit(tiny.model(job), job, PHASE_1, world))
