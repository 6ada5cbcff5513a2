"""Loss and accuracy of a model on test samples that a team of ranks shares."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from swap_hpc.average.modes import evaluating
from swap_hpc.parallel.teams import Team
from swap_hpc.train.events import Evaluation
from swap_hpc.train.objective import CLASSIFICATION, Objective, as_float32

if TYPE_CHECKING:  # a loop of one's own needs no DALI
    from swap_hpc.train.job import Batch, Job


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: "Iterable[Batch]", team: Team, objective: Objective = CLASSIFICATION
) -> Evaluation:
    """Loss and score of `model` on the batches of all ranks of `team`, each sample counted once: cross-entropy and accuracy, or others.

    `model`: the plain module, not a DistributedDataParallel around it, whose forward pass would wait for other ranks.
    `batches`: this rank's, (images (n, C, H, W), labels (n,) int64); it may have none. Every module's training mode is left as
    it was. Raises ValueError, on all ranks, where none has a sample.
    """
    losses, hits, samples = [], [], 0
    with evaluating(model):
        for images, labels in batches:
            outputs = as_float32(model(images))
            with torch.autocast(labels.device.type, enabled=False):  # as in training
                losses.append(objective.total_loss(outputs, labels))
                hits.append(objective.score(outputs, labels).sum(dtype=torch.float64))
            samples += len(labels)
    loss = torch.stack(losses).double().sum().item() if losses else 0.0
    correct = torch.stack(hits).sum().item() if hits else 0
    loss, correct, samples = team.sums(loss, correct, samples)  # type: ignore[assignment]
    if not samples:
        raise ValueError("no rank has a sample to evaluate on: give batches to at least one")
    return Evaluation(loss / samples, correct / samples)


def evaluate_job(model: nn.Module, job: "Job", team: Team) -> Evaluation:
    """`evaluate` on the job's test samples."""
    with job.autocast():
        return evaluate(model, job.test_batches(team), team, job.objective)
