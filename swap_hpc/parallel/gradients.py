"""The mean of a team's gradients, computed by Horovod while the backward pass goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.errors import RunError
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.horovod import horovod_session
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import is_dense, real

# Buckets of the gradients of one type. They are fixed, and never fused with each other, so that two
# identical runs are identical to the bit. A handful still overlaps communication with the backward
# pass.
BUCKETS = 4

# Horovod's binding cannot send some 16-bit gradients, and would round others after every addition.
_SENT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@contextmanager
def gradient_averaging(
    model: nn.Module, team: Team, device: Device, passes: int = 1
) -> Iterator[Callable[[], None]]:
    """Average the gradients of a model over the ranks of a team. Collective.

    A gradient that only some ranks have in a step, because the others' forward pass left the layer
    out, counts as zero on the others. A gradient that no rank has stays None. An infinity or a NaN
    on one rank reaches all.

    A team of one never touches Horovod. Of several trainings in one process, the last that began
    has Horovod.

    Args:
        model: in training, with the same weights on all ranks.
        team: the ranks that train the model together.
        device: this rank's.
        passes: backward passes per step.

    Yields:
        A function to call, on all ranks, between the backward passes of a step and its update: it
        replaces the gradients by their mean over the team. It raises RunError if Horovod fails, or
        if another training of this process has begun since.
    """
    if team.size == 1:
        yield _nothing
        return
    through_host = device.is_shared(team)
    with horovod_session(team, device) as session:
        reduction = _Reduction(model, team, session.hvd, passes, through_host)

        def average_gradients() -> None:
            session.check_current()
            reduction.finish()

        try:
            yield average_gradients
        finally:
            reduction.remove_hooks()


def _nothing() -> None:
    """Average the gradients of a team of one."""


class _Bucket:
    """Gradients packed into one tensor, which Horovod averages in place.

    Its last elements, one for each parameter, are 1 where this rank has the gradient: their mean
    over the ranks is 0 where none has it.
    """

    def __init__(self, number: int, parameters: list[nn.Parameter], sent_as: torch.dtype):
        self.name = f"gradients.{number}"
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        device = parameters[0].device
        self.packed = torch.zeros(sum(sizes) + len(sizes), dtype=sent_as, device=device)
        *parts, self.present = self.packed.split([*sizes, len(sizes)])
        self.views = [_shaped_like(p, part) for p, part in zip(parameters, parts, strict=True)]
        self.in_place = sent_as == parameters[0].dtype  # the views then become the gradients
        self.host: Tensor | None = None  # what is sent, where it goes through host memory
        self.handle: Any = None  # while Horovod has the bucket
        self.missing: list[int] = []  # places of the parameters without a gradient on this rank

    def send(self, hvd: Any, through_host: bool) -> None:
        """Pack this rank's gradients and hand them to Horovod, whose thread averages them."""
        self._pack()
        sent = real(self.packed)
        if through_host:
            sent = self.host = sent.cpu()
        # Horovod never fuses groups with each other, so a bucket is a group of one tensor.
        self.handle = hvd.grouped_allreduce_async_([sent], name=self.name, op=hvd.Average)

    def _pack(self) -> None:
        gradients = [p.grad for p in self.parameters]
        self.missing = [place for place, gradient in enumerate(gradients) if gradient is None]
        self.present.fill_(1)
        for place in self.missing:
            self.views[place].zero_()
            self.present[place] = 0
        pairs = zip(self.views, gradients, strict=True)
        there = [(view, gradient) for view, gradient in pairs if gradient is not None]
        if there:
            torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        for parameter in self.parameters:
            parameter.grad = None  # frees its memory for the rest of the backward pass

    @torch.no_grad()
    def receive(self, hvd: Any) -> None:
        """Wait for the mean, and make it the parameters' gradients.

        Raises:
            RunError: Horovod failed.
        """
        try:
            hvd.synchronize(self.handle)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RunError(f"Horovod could not average gradients: {reason}") from error
        self.handle = None
        if self.host is not None:
            real(self.packed).copy_(self.host)
        nowhere = self._missing_everywhere()
        for place, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            if place not in nowhere:
                parameter.grad = view if self.in_place else view.to(parameter.dtype)

    def _missing_everywhere(self) -> set[int]:
        """Return the places of the parameters without a gradient on any rank."""
        if not self.missing:
            return set()  # reading `present` would make the host wait for the GPU
        shares = self.present[self.missing].abs().tolist()
        return {place for place, share in zip(self.missing, shares, strict=True) if share == 0}


def _shaped_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return a packed part, (n,), as a view in the parameter's shape, and its strides if dense."""
    if is_dense(parameter):
        return part.as_strided(parameter.size(), parameter.stride())
    return part.view(parameter.shape)


class _Reduction:
    """The gradients of a model, averaged over a team while its backward pass goes on.

    A bucket is sent as soon as it is whole. If gradients are missing at the step, the rest is sent
    then. Horovod matches the ranks' buckets by their names, in whatever order they come.
    """

    def __init__(self, model: nn.Module, team: Team, hvd: Any, passes: int, through_host: bool):
        self.team = team
        self.hvd = hvd
        self.passes = passes
        self.through_host = through_host
        self.buckets = [
            _Bucket(number, parameters, sent_as)
            for number, (parameters, sent_as) in enumerate(gradient_buckets(model))
        ]
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.bucket_of]
        # Unknown until the first step has shown that each gradient comes once in a backward pass.
        # Until then nothing is sent before the backward pass ends.
        self.overlaps: bool | None = None
        self._begin()

    def _begin(self) -> None:
        self.arrivals = dict.fromkeys(self.bucket_of, 0)  # in this step
        self.waiting = {bucket: len(bucket.parameters) for bucket in self.buckets}

    def _arrived(self, parameter: Tensor) -> None:
        bucket = self.bucket_of[parameter]  # type: ignore[index]
        if bucket.handle is not None:
            raise RunError(
                "a gradient came again after it was sent to the other ranks: "
                "a layer's weights are used twice under reentrant activation checkpointing, "
                "in some steps only; use_reentrant=False fixes it"
            )
        self.arrivals[parameter] += 1  # type: ignore[index]
        if self.arrivals[parameter] == self.passes:  # type: ignore[index]
            self.waiting[bucket] -= 1
            if self.waiting[bucket] == 0 and self.overlaps:
                bucket.send(self.hvd, self.through_host)

    def finish(self) -> None:
        """Send the buckets that are not sent yet, and wait for all of them."""
        for bucket in self.buckets:
            if bucket.handle is None:
                bucket.send(self.hvd, self.through_host)
        for bucket in self.buckets:
            bucket.receive(self.hvd)
        if self.overlaps is None:
            most = max(self.arrivals.values(), default=0)
            self.overlaps = not self.team.any(most > self.passes)
        self._begin()

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()


def gradient_buckets(model: nn.Module) -> Iterator[tuple[list[nn.Parameter], torch.dtype]]:
    """Yield the trained parameters of each type and device in up to `BUCKETS` groups.

    Groups have about equal numbers of elements, and are in the order in which the backward pass
    reaches them.

    Yields:
        A group's parameters, and the type in which its gradients are sent.
    """
    trained = [p for p in reversed(list(model.parameters())) if p.requires_grad and p.numel()]
    for kind in dict.fromkeys((p.dtype, p.device) for p in trained):
        dtype, _ = kind
        same = [p for p in trained if (p.dtype, p.device) == kind]
        total = sum(p.numel() for p in same)
        seen = 0
        buckets: list[list[nn.Parameter]] = [[] for _ in range(BUCKETS)]
        for p in same:
            buckets[min(BUCKETS - 1, seen * BUCKETS // total)].append(p)
            seen += p.numel()
        for bucket in buckets:
            if bucket:
                yield bucket, _SENT_AS.get(dtype, dtype)
