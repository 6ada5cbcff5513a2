"""Geometry in the space of weights: vectors of parameters, planes through them, gradients."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.average.modes import training_modules
from swap_hpc.data.nested import first_tensor
from swap_hpc.data.splits import Split
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import real
from swap_hpc.run.weights import load_weights_
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.objective import as_float32

ORDER_KEY = 0x706C616E  # any constant: the same samples are chosen in every run


@dataclass(frozen=True)
class Plane:
    """The points `origin + x * right + y * up`, where `right` and `up` are orthonormal.

    All three are vectors (P,) of float64, in the units of the weights.
    """

    origin: Tensor
    right: Tensor
    up: Tensor

    @classmethod
    def through(cls, a: Tensor, b: Tensor, c: Tensor) -> "Plane":
        """Return the plane through three points, with `a` as the origin and `b` on the x axis.

        Raises:
            UserError: the points lie on one line.
        """
        right = b - a
        up = (c - a) - (c - a) @ right / (right @ right) * right
        if not (right.norm() > 0 and up.norm() > 1e-6 * right.norm()):
            raise UserError(
                "the three models lie on one line, there is no plane through them: "
                "take a run whose groups differ"
            )
        return cls(a, right / right.norm(), up / up.norm())

    def place(self, point: Tensor) -> tuple[float, float]:
        """Return (x, y) of a point's projection onto the plane."""
        offset = point - self.origin
        return float(offset @ self.right), float(offset @ self.up)

    def at(self, x: float, y: float) -> Tensor:
        """Return the point (P,) with these coordinates, in float64."""
        return self.origin + x * self.right + y * self.up


def vector(model: nn.Module) -> Tensor:
    """Return all parameters as one vector (P,) of float64 on the CPU; a complex one gives two."""
    return _joined([parameter.detach() for parameter in model.parameters()])


def vector_of(file: Path, model: nn.Module) -> Tensor:
    """Load a .safetensors file into `model` and return the parameters as one vector.

    Raises:
        UserError: the file does not fit the model.
    """
    load_weights_(model, file)
    return vector(model)


@torch.no_grad()
def fill_parameters_(model: nn.Module, values: Tensor) -> None:
    """Set all parameters to the numbers of a vector, as `vector` orders them."""
    parameters = [real(parameter) for parameter in model.parameters()]
    parts = values.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view(parameter.shape))


def gradient(model: nn.Module, batches: Iterable[Batch], job: Job) -> Tensor:
    """Return the gradient of the mean loss over all samples, a vector (P,) of float64.

    Batch norm uses each batch's own statistics, as in training. There is no dropout.
    """
    training = training_modules(model)
    model.eval()
    for _, layer in batchnorm_layers(model):
        layer.train(layer in training)
    model.zero_grad()
    # Without a loss scale, float16 would round small gradients to zero.
    forward_context = nullcontext() if job.recipe.precision == "fp16" else job.autocast()
    samples = 0
    for inputs, targets in batches:
        with forward_context:
            outputs = model(inputs)
        share = len(first_tensor(targets))
        (job.objective.loss(as_float32(outputs), targets) * share).backward()
        samples += share
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in model.parameters()
    ]
    model.zero_grad()
    return _joined(gradients) / samples


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of all tensors, (P,) float64, on the CPU."""
    return torch.cat([real(each).flatten().to("cpu", torch.float64) for each in tensors])


def with_test_samples(job: Job, split: Split, samples: int) -> Job:
    """Return the job with at most `samples` samples of a split, always the same, to test on."""
    order = np.random.Generator(np.random.Philox(ORDER_KEY)).permutation(len(split))
    chosen = split.take(np.sort(order[:samples]))
    return replace(job, dataset=replace(job.dataset, test=chosen))


def share_of_rank(number: int, world: Team) -> Sequence[int]:
    """Return the indices, from 0 to `number` - 1, that this rank works on."""
    return range(world.rank, number, world.size)
