"""Averaging and batch-norm refresh against references computed by hand."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn

from swap_hpc.average import uniform
from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.average.sharing import average_buffers_
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.parallel.teams import Team

pytestmark = pytest.mark.process_groups(2, 4)


def random_model(seed: int) -> nn.Sequential:
    """Return a model with every kind of tensor, in several types and layouts."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Linear(5, 11))
    model.append(nn.InstanceNorm2d(3, track_running_stats=True))
    model.append(nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last))
    model.scale = nn.Parameter(torch.randn(3).bfloat16())
    model.sixteen = nn.Parameter(torch.randn(2, 2).half(), requires_grad=False)
    model.filter = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
    model.transposed = nn.Parameter(torch.randn(4, 3).t())
    model.scalar = nn.Parameter(torch.randn(()))
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.register_buffer("steps", torch.tensor(seed))
    model.register_buffer("table", torch.randn(2, 1, 3))
    model.register_buffer("row", torch.randn(1, 3).expand(4, 3))
    model.register_buffer("factor", torch.randn(()))
    with torch.no_grad():
        for layer in (1, 3):
            model.get_buffer(f"{layer}.running_mean").add_(seed)
    return model


def is_kept(name: str) -> bool:
    """Tell whether an entry of `random_model` is not averaged."""
    others = ("steps", "table", "row", "factor")
    return name in others or name.startswith(("1.running", "1.num", "3.num"))


def float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@pytest.mark.ranks(2, 4)
def test_nothing_of_the_layout_is_sent_but_a_hash(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tensors a model has, and however long their names are."""
    numbers = []
    maximum = Team.maximum

    def counted(team: Team, *values: float) -> list[float]:
        numbers.append(len(values))
        return maximum(team, *values)

    monkeypatch.setattr(Team, "maximum", counted)
    for name in ("allgather", "gathered", "broadcast", "scatter"):
        monkeypatch.setattr(Team, name, lambda *arguments: pytest.fail("more than a hash is sent"))
    model = nn.ModuleDict({f"{number}-{'long' * 1000}": nn.Linear(2, 2) for number in range(100)})
    average_weights_(model, world)
    assert numbers == [8]


@pytest.mark.ranks(3)
def test_another_model_on_a_rank_is_refused_on_all(world: Team) -> None:
    model = nn.Linear(3, 2 + (world.rank == 1))
    message = "the model of rank 1 has other weights than that of rank 0"
    with pytest.raises(ValueError, match=message):
        average_weights_(model, world)


@pytest.mark.ranks(1, 2, 3, 4, 8)
@pytest.mark.parametrize("chunk", [10, uniform.CHUNK])
def test_the_average_is_the_rounded_float64_mean(
    world: Team, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uniform, "CHUNK", chunk)
    models = [random_model(seed) for seed in range(world.size)]
    mine = random_model(world.rank)
    average_weights_(mine, world)
    for name, tensor in mine.state_dict().items():
        everyones = [model.state_dict()[name] for model in models]
        if is_kept(name):
            expected = everyones[0]
        else:
            total = torch.stack([float64(each) for each in everyones]).sum(0)
            expected = (total / world.size).to(tensor.dtype)
        assert torch.equal(tensor, expected), name
        assert tensor.stride() == everyones[0].stride()


@pytest.mark.ranks(1, 2, 3, 4, 8)
def test_the_layout_of_the_ranks_does_not_matter(world: Team) -> None:
    """24 models that the ranks share average to the same bits as on one rank."""
    each = 24 // world.size
    mine, whole = WeightSum(), WeightSum()
    for seed in range(24):
        whole.add_(random_model(seed))
        if seed // each == world.rank:
            mine.add_(random_model(seed))
    here, there = random_model(0), random_model(0)
    average_weights_(here, world, mine)
    average_weights_(there, Team.alone(), whole)
    assert torch.equal(tiny.weights(here), tiny.weights(there))


def test_the_order_in_which_a_rank_holds_its_sum_does_not_matter(world: Team) -> None:
    """A rank that was resumed from a file has the file's order, and the last rank has no sum."""
    total, whole = WeightSum(), WeightSum()
    contributing = max(1, world.size - 1)
    for rank in range(contributing):
        whole.add_(random_model(rank))
    if world.rank < contributing:
        total.add_(random_model(world.rank))
    total.sums = dict(sorted(total.sums.items(), reverse=world.rank % 2 == 1))
    here, there = random_model(0), random_model(0)
    average_weights_(here, world, total)
    average_weights_(there, Team.alone(), whole)
    assert torch.equal(tiny.weights(here), tiny.weights(there))


def batches(count: int) -> list[Tensor]:
    """Return batches of different sizes, means and variances."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(5 + i % 3, 3, 8, 8, generator=generator) * (1 + i) + i for i in range(count)
    ]


def reference_statistics(model: nn.Module, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the mean and unbiased variance of each batch-norm layer's inputs, by definition.

    In float64, from all inputs at once.
    """
    model = model.double()
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in batchnorms(model)}
    for x in inputs:
        x = x.double()
        for layer in model:  # type: ignore[attr-defined]
            if isinstance(layer, nn.BatchNorm2d):
                seen[layer].append(x.detach())
                x = normalised(layer, x)
            elif not isinstance(layer, nn.Dropout):
                x = layer(x)
    flat = [
        torch.cat([x.transpose(0, 1).flatten(1) for x in each], dim=1) for each in seen.values()
    ]
    return [(x.mean(1), x.var(1, unbiased=True)) for x in flat]


def normalised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what a batch-norm layer returns in training."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (parameter.view(1, -1, 1, 1) for parameter in (layer.weight, layer.bias))
    return (x - mean) / (variance + layer.eps).sqrt() * weight + bias


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def check_equal_on_all(model: nn.Module, world: Team) -> None:
    everyones = world.allgather(tiny.weights(model))
    assert all(torch.equal(everyones[0], other) for other in everyones)


def test_refresh_equals_float64_by_hand(world: Team) -> None:
    inputs = batches(7)
    model = tiny.normed(3, 3)
    refresh_batchnorm_(model, inputs[world.rank :: world.size], world)
    reference = tiny.normed(3, 3)
    reference.load_state_dict(model.state_dict())
    expected = reference_statistics(reference, inputs)
    for layer, (mean, variance) in zip(batchnorms(model), expected, strict=True):
        assert layer.running_mean is not None and layer.running_var is not None
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 7
    check_equal_on_all(model, world)


def test_refresh_on_ranks_equals_one_ranks(world: Team) -> None:
    torch.manual_seed(0)
    here = tiny.normed(3, 3)
    there = tiny.normed(3, 3)
    there.load_state_dict(here.state_dict())
    refresh_batchnorm_(here, batches(5)[world.rank :: world.size], world)
    refresh_batchnorm_(there, batches(5), Team.alone())
    torch.testing.assert_close(tiny.weights(here), tiny.weights(there), rtol=1e-6, atol=1e-7)


def test_a_refresh_that_fails_leaves_the_model_as_it_was(world: Team) -> None:
    """No hook stays; statistics, momenta and modes are as before."""
    model = tiny.normed(3, 3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    default_momentum = nn.BatchNorm2d(1).momentum

    def damaged() -> Iterator[torch.Tensor]:
        yield from batches(2)
        raise OSError("a damaged image")

    wrong_channels = [*batches(2), torch.zeros(2, 5, 4, 4)]
    for inputs, error in ((wrong_channels, RuntimeError), (damaged(), OSError)):
        with pytest.raises(error):
            refresh_batchnorm_(model, inputs, Team.alone())
        assert not any(module._forward_hooks for module in model.modules())
        assert all(module.training for module in model.modules())
        assert [layer.momentum for layer in batchnorms(model)] == [default_momentum] * 2
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def frozen(model: nn.Module) -> nn.BatchNorm2d:
    layer = model.get_submodule("body.1")
    assert isinstance(layer, nn.BatchNorm2d)
    return layer


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("mode", ["as built", "training", "evaluation", "by hand"])
def test_frozen_batch_norm_keeps_its_statistics(world: Team, mode: str) -> None:
    """The model's own train() may freeze it, or its user after train(); also in a team's mean."""
    torch.manual_seed(0)
    model = tiny_net() if mode == "by hand" else zoo.frozen_batch_norm(3, 3)
    if mode == "evaluation":
        model.eval()
    elif mode != "as built":
        model.train()
    if mode == "by hand":
        frozen(model).eval()
    before = {name: tensor.clone() for name, tensor in frozen(model).state_dict().items()}
    modes = [m.training for m in model.modules()]
    refresh_batchnorm_(model, batches(3)[world.rank :: world.size], world)
    average_buffers_(model, world)
    for name, tensor in frozen(model).state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [m.training for m in model.modules()] == modes


def tiny_net() -> nn.Module:
    return zoo.Net(3, 3)


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_divides_by_the_norm_of_the_averaged_weights(world: Team, old: bool) -> None:
    """The groups' weights have nothing in common.

    So neither a group's vectors nor their mean are those of the average.
    """
    torch.manual_seed(world.rank)
    model = zoo.Spectral(3, 3, old).train()
    for x in batches(2):
        model(x)  # in training mode, so that each group's vectors belong to its own weights
    average_weights_(model, world)
    refresh_batchnorm_(model, batches(2)[world.rank :: world.size], world)
    model.eval()
    model(batches(1)[0])
    layers: Any = model.layers
    for layer in layers:
        weight = layer.weight_orig if old else layer.parametrizations.weight.original
        divisor = (weight / layer.weight).mean().item()
        norm = torch.linalg.matrix_norm(weight, 2).item()
        assert divisor == pytest.approx(norm, rel=1e-4)
    check_equal_on_all(model, world)


class Annealed(nn.Module):
    """A parametrization with a number that falls with each forward pass in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor([1.0]))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("tau").mul_(0.9)
        return weight * self.get_buffer("tau")


@pytest.mark.ranks(1, 2)
def test_other_buffers_of_a_parametrization_are_not_iterated(world: Team) -> None:
    layer = nn.Linear(2, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Annealed())
    tau = layer.get_buffer("parametrizations.weight.0.tau")
    before = tau.clone()
    refresh_batchnorm_(layer, [], world)
    assert torch.equal(tau, before)


class HandsOutCopies(nn.Linear):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        return {
            name: tensor.half() for name, tensor in super().state_dict(*arguments, **named).items()
        }


@pytest.mark.ranks(2)
@pytest.mark.process_groups(2)
def test_a_state_dict_that_hands_out_copies_does_not_matter(world: Team) -> None:
    model = HandsOutCopies(2, 3)
    with torch.no_grad():
        model.weight.fill_(world.rank)
    average_weights_(model, world)
    assert model.weight.tolist() == [[0.5, 0.5]] * 3


class Remembering(nn.Linear):
    """A layer whose extra state is a plain attribute."""

    def __init__(self, note: Any) -> None:
        super().__init__(2, 3)
        self.note = note

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


@pytest.mark.ranks(1, 2)
def test_extra_states_are_the_first_ranks(world: Team) -> None:
    """They may have any length. With a sum, they are those first added to it."""
    note = {"seen": list(range(10 * world.rank)), "where": f"rank {world.rank}"}
    model = nn.Sequential(Remembering(note))
    average_weights_(model, world)
    assert model[0].note == {"seen": [], "where": "rank 0"}
    total = WeightSum()
    for number in range(2):
        total.add_(nn.Sequential(Remembering((world.rank, number))))
    average_weights_(model, world, total)
    assert model[0].note == (0, 0)


def test_refresh_changes_nothing_else(world: Team) -> None:
    model = tiny.normed(3, 3).train()
    layer = model.get_submodule("1")
    assert isinstance(layer, nn.BatchNorm2d)
    layer.momentum = 0.3
    weights = [p.clone() for p in model.parameters()]
    refresh_batchnorm_(model, batches(3), world)
    assert all(m.training for m in model.modules()) and layer.momentum == 0.3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_buffers_of_other_layers_are_alike_after_an_epoch(world: Team) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
    model.register_buffer("seen", torch.tensor([world.rank + 5]))
    model.register_buffer("table", torch.full((2, 1, 3), 1.0 + world.rank))
    model.register_buffer("row", torch.full((1, 3), 1.0 + world.rank).expand(4, 3))
    model.register_buffer("scale", torch.tensor(1.0 + world.rank))
    model.register_buffer("none", torch.empty(0, 2))
    model.get_buffer("0.running_mean").fill_(world.rank)
    average_buffers_(model, world)
    assert all((model.get_buffer(name) == 1).all() for name in ("table", "row", "scale"))
    assert model.get_buffer("0.running_mean").tolist() == [(world.size - 1) / 2] * 3
    assert model.get_buffer("0.running_var").tolist() == [1.0] * 3
    assert model.get_buffer("seen").tolist() == [5]


def test_running_statistics_are_averaged(world: Team) -> None:
    name = "1.running_mean"
    model = random_model(world.rank)
    everyones = [random_model(rank).state_dict()[name].double() for rank in range(world.size)]
    average_buffers_(model, world)
    mean = model.state_dict()[name].double()
    torch.testing.assert_close(mean, torch.stack(everyones).mean(0), rtol=1e-6, atol=1e-7)
