"""The mean of a team's gradients equals that of plain torch on one rank, for any parameters."""

from collections.abc import Callable

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.data.seeding import seed_all
from swap_hpc.parallel.gradients import BUCKETS, gradient_averaging, gradient_buckets
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import tensor_bytes

STEPS = 3
SHARE = 4  # samples of a rank in a step


def inputs(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(SHARE, 3, 8, 8, generator=generator)
    return images, torch.randint(3, (SHARE,), generator=generator)


def backward(model: nn.Module, rank: int, step: int, parts: int = 1) -> None:
    """Add one rank's gradients of a step, with random numbers of that rank."""
    seed_all(100 * step + rank)
    images, labels = inputs(rank, step)
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (F.cross_entropy(model(x).float(), y) / parts).backward()


def built(build: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = build()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def on_ranks(build: Callable[[], nn.Module], world: Team, parts: int = 1) -> nn.Module:
    """Return a model after `STEPS` steps on the ranks of `world`.

    Args:
        build: makes the model.
        world: the ranks.
        parts: backward passes per step.
    """
    model, sgd = built(build)
    with gradient_averaging(model, world, tiny.CPU, parts) as average_gradients:
        for step in range(STEPS):
            sgd.zero_grad()
            backward(model, world.rank, step, parts)
            average_gradients()
            sgd.step()
    return model


def on_one(build: Callable[[], nn.Module], ranks: int, parts: int = 1) -> nn.Module:
    """Return what `on_ranks` should, computed on one rank that takes all ranks' parts in turn.

    A gradient that a rank lacks is a zero; one that all lack stays None.
    """
    model, sgd = built(build)
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
    """A model with a layer of another type between two of float32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 3)
        self.middle = nn.Linear(8, 8).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.flatten(1)).to(self.middle.weight.dtype)
        return self.last(self.middle(x).to(torch.float32))


class Odd(nn.Module):
    """A model with parameters without elements, without dimensions, or with unusual strides."""

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
        found = on_ranks(MODELS[name], world, parts)
        expected = on_one(MODELS[name], world.size, parts)
        check_equal(found, expected, 2e-2 if coarse else 1e-5)
        mine = b"".join(tensor_bytes(p).tobytes() for p in found.parameters())
        assert len(set(world.allgather(mine))) == 1


@pytest.mark.ranks(2)
def test_a_gradient_that_comes_in_two_parts_is_sent_whole(world: Team) -> None:
    """The gradient of a layer that is used twice under reentrant checkpointing comes in parts."""

    def build() -> nn.Module:
        return zoo.Rechecked(3, 3)

    check_equal(on_ranks(build, world), on_one(build, world.size), 1e-5)


def check_equal(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, one), other in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.numel():
            difference = (one - other).abs().max().item()
            assert difference <= tolerance * (1 + other.abs().max().item()), name


@pytest.mark.ranks(2)
def test_horovods_own_settings_do_no_harm(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod 0.28.1 crashes if it is started a second time with both of these set."""
    for _ in range(2):
        monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "33554432")
        monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
        found, expected = on_ranks(MODELS["odd"], world), on_one(MODELS["odd"], world.size)
        check_equal(found, expected, 1e-5)


@pytest.mark.ranks(2)
def test_no_hook_stays(world: Team) -> None:
    model = on_ranks(MODELS["odd"], world)
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.ranks(2)
def test_thousands_of_small_parameters_are_a_handful_of_messages(world: Team) -> None:
    """The cost of a step beside its computing grows linearly with the number of tensors."""

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
