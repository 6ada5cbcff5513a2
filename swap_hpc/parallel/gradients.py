"""The mean of a team's gradients, by Horovod. The only module that imports it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import is_dense, real

# Horovod fuses gradients as they happen to arrive, and a ring sums an element in an order that depends on its place in
# the buffer. Fixed buckets, never fused with each other, make two identical runs identical to the bit. A handful of
# them still overlaps communication with the backward pass.
BUCKETS = 4


_starts = 0  # of this process's Horovod


os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")


def end_stalls(seconds: float) -> None:
    """Lets Horovod end a phase in which a rank does not send its gradients, half as late again as that many seconds (0: never)."""
    if seconds:
        os.environ.setdefault(
            "HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, min(60, int(seconds / 2))))
        )
        os.environ.setdefault(
            "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(2, int(1.5 * seconds)))
        )


def load_horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"several ranks train one model with Horovod, which cannot be loaded here ({error}): make setup builds it"
        ) from None
    return hvd


def check_horovod(device: Device, shared: bool) -> None:
    """Raises UserError where several ranks cannot train one model on this device, with the command that mends it.

    `shared`: two ranks use one GPU; then gradients go through host memory, without NCCL.
    """
    if not load_horovod().nccl_built() and device.torch.type == "cuda" and not shared:
        raise UserError(
            "this Horovod was built without NCCL and cannot reduce gradients on GPUs: make setup HOROVOD_BUILD=nccl"
        )


@contextmanager
def averaged_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, team: Team, device: Device, passes: int = 1
) -> Iterator[torch.optim.Optimizer]:
    """`optimizer`, stepping with gradients averaged over `team`, whose ranks hold equal weights.

    A gradient that some ranks do not have in a step, because their forward pass left the layer out,
    is a zero there; what no rank has stays None. `passes`: backward passes per step.

    Horovod is started on the team's communicator and shut down at the end, or when all leave training,
    so that no thread of it runs in other parts of a run. A team of one never touches Horovod.
    A process has one Horovod: of several trainings, the last that began has it, and a step of an earlier one
    raises RunError.
    """
    if team.size == 1:
        yield optimizer
        return
    hvd = load_horovod()
    through_host = device.is_shared(team)
    if device.torch.type == "cpu":
        # Horovod's thread wakes up every millisecond to ask the other ranks; with the model on the same core that costs a third of the step
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
    # Nothing is fused here; and Horovod 0.28.1 crashes when it starts a second time with both of these set.
    os.environ.pop("HOROVOD_FUSION_THRESHOLD", None)
    if hvd.is_initialized():  # left by a training that an error ended: its communicator may be another one, and init() would keep it
        hvd.shutdown()
    hvd.init(team.comm)
    global _starts
    _starts = start = _starts + 1
    try:
        reduction = _Reduction(model, team, hvd, passes, through_host)

        def finish(*_: Any) -> None:
            if _starts != start:
                raise RunError(
                    "another training of this process has begun since, and has its Horovod: end one before the next begins"
                )
            reduction.finish()

        hook = optimizer.register_step_pre_hook(finish)
        try:
            yield optimizer
        finally:
            hook.remove()
            reduction.remove_hooks()
    except GeneratorExit:  # all ranks leave training before its end; at an error of one rank the others may not be there to shut down with
        # A generator that an error left suspended is closed when its memory is freed: Horovod may be another training's by then.
        if _starts == start:
            hvd.shutdown()
        raise
    if _starts == start:
        hvd.shutdown()


class _Bucket:
    """Gradients packed into one tensor, which Horovod averages in place.

    Its last elements, one for each parameter, are 1 where this rank has the gradient: their mean over
    the ranks is 0 where none has it.
    """

    def __init__(self, number: int, parameters: list[nn.Parameter], sent_as: torch.dtype):
        self.name = f"gradients.{number}"
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        device = parameters[0].device
        self.packed = torch.zeros(sum(sizes) + len(sizes), dtype=sent_as, device=device)
        *parts, self.present = self.packed.split([*sizes, len(sizes)])
        self.views = [_as(p, part) for p, part in zip(parameters, parts, strict=True)]
        self.in_place = sent_as == parameters[0].dtype  # the views then become the gradients
        self.host: Tensor | None = None  # what is sent, where it goes through host memory
        self.handle: Any = None  # while Horovod has it
        self.missing: list[int] = []  # places of the parameters without a gradient on this rank

    def send(self, hvd: Any, through_host: bool) -> None:
        """Packs this rank's gradients and hands them to Horovod, whose thread averages them."""
        gradients = [p.grad for p in self.parameters]
        self.missing = [place for place, gradient in enumerate(gradients) if gradient is None]
        self.present.fill_(1)
        for place in self.missing:
            self.views[place].zero_()
            self.present[place] = 0
        if len(self.missing) < len(gradients):
            pairs = [
                (view, g) for view, g in zip(self.views, gradients, strict=True) if g is not None
            ]
            torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])
        for parameter in self.parameters:
            parameter.grad = None  # packed: its memory is free for what comes next
        sent = real(self.packed)
        if through_host:
            sent = self.host = sent.cpu()
        # A group of one: groups are never fused with each other.
        self.handle = hvd.grouped_allreduce_async_([sent], name=self.name, op=hvd.Average)

    @torch.no_grad()
    def receive(self, hvd: Any) -> None:
        """Waits for the mean, and makes it the gradients."""
        try:
            hvd.synchronize(self.handle)
        except RuntimeError as error:
            raise RunError(
                f"Horovod could not average gradients: {' '.join(str(error).split())}"
            ) from error
        self.handle = None
        if self.host is not None:
            real(self.packed).copy_(self.host)
        nowhere: set[int] = set()
        if self.missing:
            present = self.present[self.missing].abs().tolist()
            nowhere = {
                place for place, share in zip(self.missing, present, strict=True) if share == 0
            }
        for place, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            if place in nowhere:
                continue
            parameter.grad = view if self.in_place else view.to(parameter.dtype)


def _as(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A part of a packed tensor, (n,), seen in a parameter's shape, and in its strides where they are dense."""
    if is_dense(parameter):
        return part.as_strided(parameter.size(), parameter.stride())
    return part.view(parameter.shape)


class _Reduction:
    """The gradients of a model, averaged over a team while its backward pass goes on.

    A bucket is sent as soon as it is whole. What is not whole at the step, since some gradients are
    missing, is sent then. Horovod matches the ranks' buckets by their names, in whatever order they come.
    """

    def __init__(self, model: nn.Module, team: Team, hvd: Any, passes: int, through_host: bool):
        self.team, self.hvd, self.passes, self.through_host = team, hvd, passes, through_host
        self.buckets = [
            _Bucket(number, parameters, sent_as)
            for number, (parameters, sent_as) in enumerate(_buckets(model))
        ]
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.bucket_of]
        # Until the first step has shown that each gradient comes once in a backward pass, nothing is sent before its end.
        self.overlaps: bool | None = None
        self._begin()

    def _begin(self) -> None:
        self.arrivals = dict.fromkeys(self.bucket_of, 0)
        self.waiting = {bucket: len(bucket.parameters) for bucket in self.buckets}

    def _arrived(self, parameter: Tensor) -> None:
        bucket = self.bucket_of[parameter]  # type: ignore[index]
        if bucket.handle is not None:
            raise RunError(
                "a gradient came again after it was sent to the other ranks: a layer's weights are used "
                "twice under reentrant activation checkpointing, in some steps only; use_reentrant=False mends it"
            )
        self.arrivals[parameter] += 1  # type: ignore[index]
        if self.arrivals[parameter] == self.passes:  # type: ignore[index]
            self.waiting[bucket] -= 1
            if self.waiting[bucket] == 0 and self.overlaps:
                bucket.send(self.hvd, self.through_host)

    def finish(self) -> None:
        """Sends what has not been sent, and waits for all of it."""
        for bucket in self.buckets:
            if bucket.handle is None:
                bucket.send(self.hvd, self.through_host)
        for bucket in self.buckets:
            bucket.receive(self.hvd)
        if self.overlaps is None:
            self.overlaps = not self.team.any(max(self.arrivals.values(), default=0) > self.passes)
        self._begin()

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()


# What Horovod's binding cannot send, or would round after every addition, is sent as float32.
_SENT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _buckets(model: nn.Module) -> Iterator[tuple[list[nn.Parameter], torch.dtype]]:
    """The trained parameters of each type in up to `BUCKETS` groups of about equal size, in the order in which
    backward reaches them, and the type in which they are sent."""
    trained = [p for p in reversed(list(model.parameters())) if p.requires_grad and p.numel()]
    for kind in dict.fromkeys((p.dtype, p.device) for p in trained):
        same = [p for p in trained if (p.dtype, p.device) == kind]
        total, seen = sum(p.numel() for p in same), 0
        buckets: list[list[nn.Parameter]] = [[] for _ in range(BUCKETS)]
        for p in same:
            buckets[min(BUCKETS - 1, seen * BUCKETS // total)].append(p)
            seen += p.numel()
        yield from ((bucket, _SENT_AS.get(kind[0], kind[0])) for bucket in buckets if bucket)
