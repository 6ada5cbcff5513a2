"""The loss and the metrics of a model on samples that a team of ranks shares."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from swap_hpc.average.modes import check_unwrapped, evaluating
from swap_hpc.data.nested import first_tensor
from swap_hpc.parallel.teams import Team
from swap_hpc.train.events import Evaluation
from swap_hpc.train.objective import CLASSIFICATION, Objective, as_float32

if TYPE_CHECKING:  # a training loop of the user's own needs no DALI
    from swap_hpc.data.dataset import SplitName
    from swap_hpc.train.job import Batch, Job


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: "Iterable[Batch]", team: Team, objective: Objective = CLASSIFICATION
) -> Evaluation:
    """Return the mean loss and the metrics of `model` over the samples of all ranks. Collective.

    Losses are summed in float64 over the batches and the ranks. The model is in evaluation mode
    meanwhile; afterwards each module has its own mode back.

    Args:
        model: the same on all ranks. The plain module, not a DistributedDataParallel around it,
            whose forward pass would wait for other ranks.
        batches: this rank's share of the samples, (images (n, C, H, W) float32, labels (n,) int64)
            on the model's device; a rank may have none. With another objective, whatever the model
            and the objective take: tensors (n, ...), also in tuples, lists and dictionaries.
        team: the ranks whose samples count together.
        objective: the loss and the metrics that are measured; by default cross-entropy, in nats,
            and the share of right answers.

    Returns:
        The mean loss and the metrics over all samples; the same on all ranks.

    Raises:
        ValueError: on all ranks, no rank has a sample; or the model is a DistributedDataParallel.
    """
    check_unwrapped(model)
    losses, sums, samples = [], [], 0
    with evaluating(model):
        for images, labels in batches:
            outputs = as_float32(model(images))
            first = first_tensor(labels)
            with torch.autocast(first.device.type, enabled=False):  # as in training
                losses.append(objective.total_loss(outputs, labels))
                sums.append(objective.sums(outputs, labels))
            samples += len(first)
    # Sums stay on the device until here, so that the host does not wait for it at every batch.
    loss = torch.stack(losses).double().sum().item() if losses else 0.0
    mine = torch.stack(sums).sum(0).tolist() if sums else [0.0] * objective.size
    total_loss, total_samples, *totals = team.sums(loss, samples, *mine)
    if not total_samples:
        raise ValueError("no rank has a sample to evaluate on: give batches to at least one")
    return objective.evaluation(total_loss, totals, total_samples)


def evaluate_job(
    model: nn.Module, job: "Job", team: Team, split: "SplitName" = "test"
) -> Evaluation:
    """Evaluate `model` on a split of the job's data, in its precision. Collective."""
    with job.autocast():
        return evaluate(model, job.test_batches(team, split), team, job.objective)


def evaluate_for_report(model: nn.Module, job: "Job", team: Team) -> "dict[SplitName, Evaluation]":
    """Evaluate `model` on the validation split, if there is one, and the test split. Collective."""
    names: tuple[SplitName, ...] = ("validation", "test")
    there = [name for name in names if name in job.dataset.splits]
    return {name: evaluate_job(model, job, team, name) for name in there}
