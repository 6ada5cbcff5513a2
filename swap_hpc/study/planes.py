"""Directions in the space of weights: vectors of a model's parameters, planes through three of them, gradients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.average.modes import training_modules
from swap_hpc.data.splits import Split
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import real
from swap_hpc.run.weights import load_weights_
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.objective import as_float32


@dataclass(frozen=True)
class Plane:
    """The points `origin + x * right + y * up`; `right` and `up` are orthonormal."""

    origin: Tensor  # (P,) float64
    right: Tensor
    up: Tensor

    @classmethod
    def through(cls, a: Tensor, b: Tensor, c: Tensor) -> "Plane":
        """The plane in which `a` is the origin and `b` lies on the axis of x. Raises UserError for points on one line."""
        right = b - a
        up = (c - a) - (c - a) @ right / (right @ right) * right
        if not (right.norm() > 0 and up.norm() > 1e-6 * right.norm()):
            raise UserError(
                "the three models lie on one line, there is no plane through them: take a run whose groups differ"
            )
        return cls(a, right / right.norm(), up / up.norm())

    def place(self, point: Tensor) -> tuple[float, float]:
        """(x, y) of a point's projection onto the plane, in the units of the weights."""
        return float((point - self.origin) @ self.right), float((point - self.origin) @ self.up)

    def at(self, x: float, y: float) -> Tensor:
        """(P,) float64."""
        return self.origin + x * self.right + y * self.up


def vector(model: nn.Module) -> Tensor:
    """All parameters, (P,) float64, on the CPU; of complex ones both parts."""
    return torch.cat(
        [real(p.detach()).flatten().to("cpu", torch.float64) for p in model.parameters()]
    )


def vector_of(file: Path, model: nn.Module) -> Tensor:
    """The parameters in a .safetensors file. Changes `model`. Raises UserError where they do not fit it."""
    load_weights_(model, file)
    return vector(model)


@torch.no_grad()
def fill_parameters_(model: nn.Module, values: Tensor) -> None:
    """The reverse of `vector`."""
    parameters = [real(p) for p in model.parameters()]
    for parameter, part in zip(
        parameters, values.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.copy_(part.view(parameter.shape))


def gradient(model: nn.Module, batches: Iterable[Batch], job: Job) -> Tensor:
    """Of the mean loss over all samples of `batches`, (P,) float64. Batch norm sees each batch's own statistics, as in training; there
    is no dropout."""
    training = training_modules(model)
    model.eval()
    for _, layer in batchnorm_layers(model):
        layer.train(layer in training)
    model.zero_grad()
    samples = 0
    for images, labels in batches:
        with job.autocast():
            outputs = model(images)
        (job.objective.loss(as_float32(outputs), labels) * len(labels)).backward()
        samples += len(labels)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([real(part).flatten().to("cpu", torch.float64) for part in parts]) / samples


def seen_as_tests(job: Job, split: Split, samples: int) -> Job:
    """The job with up to that many samples of a split, always the same ones, as its test samples."""
    order = np.random.Generator(np.random.Philox(0x706C616E)).permutation(len(split))
    return replace(job, dataset=replace(job.dataset, test=split.take(np.sort(order[:samples]))))


def shared_out(number: int, world: Team) -> Sequence[int]:
    """Which of that many items are this rank's."""
    return range(world.rank, number, world.size)
