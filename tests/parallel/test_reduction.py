"""The mean of a team's gradients, whatever the parameters are, beside plain torch on one rank."""

from collections.abc import Callable

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.data.seeding import seed_all
from swap_hpc.parallel.gradients import averaged_gradients
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import tensor_bytes

STEPS = 3
SHARE = 4  # samples of a rank in a step


def inputs(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(SHARE, 3, 8, 8, generator=generator)
    return images, torch.randint(3, (SHARE,), generator=generator)


def backward(model: nn.Module, rank: int, step: int, parts: int = 1) -> None:
    """One rank's gradients of a step, with its own random numbers."""
    seed_all(100 * step + rank)
    images, labels = inputs(rank, step)
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (F.cross_entropy(model(x).float(), y) / parts).backward()


def on_ranks(build: Callable[[], nn.Module], world: Team, parts: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with averaged_gradients(model, sgd, world, tiny.CPU, parts) as optimizer:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, world.rank, step, parts)
            optimizer.step()
    return model


def on_one(build: Callable[[], nn.Module], ranks: int, parts: int = 1) -> nn.Module:
    """The same, of all ranks in turn: what a rank lacks is a zero, what all lack is no gradient."""
    torch.manual_seed(0)
    model = build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        found: list[list[Tensor | None]] = []
        for rank in range(ranks):
            model.zero_grad()
            backward(model, rank, step, parts)
            found.append([p.grad for p in model.parameters()])
        for parameter, gradients in zip(model.parameters(), zip(*found, strict=True), strict=True):
            there = [g for g in gradients if g is not None]
            parameter.grad = torch.stack(there).sum(0) / ranks if there else None
        sgd.step()
    return model


class Typed(nn.Module):
    """A layer of another type between two of float32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 3)
        self.middle = nn.Linear(8, 8).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.flatten(1)).to(self.middle.weight.dtype)
        return self.last(self.middle(x).to(torch.float32))


class Odd(nn.Module):
    """Parameters without elements, without dimensions, and in an order of their own in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter((0.1 * torch.randn(180, 3)).t().contiguous().t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).flatten(1)
        return x @ self.turned * self.scale + self.fixed + self.nothing.sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer drop": lambda: zoo.dropping(3, 3),
    "layer drop by numpy": lambda: zoo.dropping(3, 3, "numpy"),
    "complex": lambda: zoo.Complex(3, 3),
    "odd": Odd,
    "float64": lambda: Typed(torch.float64),
    "bfloat16": lambda: Typed(torch.bfloat16),
    "float16": lambda: Typed(torch.float16),
    "hook": lambda: zoo.gradient_mask(3, 3),
}


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("name", MODELS)
def test_steps_on_ranks_are_those_of_one_rank_with_zeros(world: Team, name: str) -> None:
    coarse = name in ("bfloat16", "float16")
    for parts in (1, 2):
        found, expected = (
            on_ranks(MODELS[name], world, parts),
            on_one(MODELS[name], world.size, parts),
        )
        check_equal(found, expected, 2e-2 if coarse else 1e-5)
        mine = b"".join(tensor_bytes(p).tobytes() for p in found.parameters())
        assert len(set(world.allgather(mine))) == 1


@pytest.mark.ranks(2)
def test_a_gradient_that_comes_in_two_parts_is_sent_whole(world: Team) -> None:
    """A layer that is used twice under reentrant checkpointing has its gradient added to twice."""

    def build() -> nn.Module:
        return zoo.Rechecked(3, 3)

    check_equal(on_ranks(build, world), on_one(build, world.size), 1e-5)


def check_equal(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, one), other in pairs:
        difference = (one - other).abs().max().item() if one.numel() else 0.0
        assert difference <= tolerance * (1 + other.abs().max().item() if one.numel() else 1), name
        assert (one.grad is None) == (other.grad is None), name


@pytest.mark.ranks(2)
def test_horovods_own_settings_do_no_harm(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod 0.28.1 crashes where it is started again with both of these set."""
    for _ in range(2):
        monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "33554432")
        monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
        found, expected = on_ranks(MODELS["odd"], world), on_one(MODELS["odd"], world.size)
        check_equal(found, expected, 1e-5)


@pytest.mark.ranks(2)
def test_no_hook_of_ours_stays(world: Team) -> None:
    model = on_ranks(MODELS["odd"], world)
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.ranks(2)
def test_thousands_of_small_parameters_are_a_handful_of_messages(world: Team) -> None:
    """What a step costs beside its computing grows with the tensors, not with their square."""
    from swap_hpc.parallel.gradients import BUCKETS, gradient_buckets

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(3000)])
            self.last = nn.Linear(192, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(images.flatten(1)) * torch.stack(list(self.scales)).mean()

    found, expected = on_ranks(Many, world), on_one(Many, world.size)
    assert len(list(gradient_buckets(found))) <= BUCKETS
    torch.testing.assert_close(tiny.weights(found), tiny.weights(expected), rtol=1e-5, atol=1e-6)
