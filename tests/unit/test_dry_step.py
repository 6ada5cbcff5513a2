"""Models that cannot be trained, saved, loaded or built again end in one line before phase 1.

State that would be lost without an error is warned of.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn

from swap_hpc.data import Batches, Dataset
from swap_hpc.data.sampling import Key, Picks
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Phase
from swap_hpc.run.dry_step import dry_step
from swap_hpc.train.job import Job


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Return a function that makes a job whose recipe names a builder of models."""
    module = ModuleType("built_here")
    monkeypatch.setitem(sys.modules, "built_here", module)

    def made(build: Callable[..., nn.Module], **overrides: Any) -> Job:
        vars(module)["build"] = build
        return tiny.job(model={"name": "built_here:build"}, **overrides)

    return made


def tried(job: Job, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Make the dry step of phase 1."""
    key = Key(job.recipe.seed, Phase.LARGE_BATCH)
    return dry_step(model, job, job.recipe.large_batch, key, Team.alone())


def warnings_of(job: Job) -> list[str]:
    return tried(job, job.build())[1]


class Raising(zoo.Net):
    def forward(self, images: Tensor) -> Tensor:
        raise KeyError("features")


class Evaluating(zoo.Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if self.training else self.never_set  # type: ignore[return-value]


class Sparse(zoo.Net):
    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.table = nn.Embedding(4, classes, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.table(torch.zeros(len(images), dtype=torch.long))


class Copies(zoo.Net):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        return {name: t.clone() for name, t in super().state_dict(*arguments, **named).items()}


class LeavesOut(zoo.Net):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        whole = super().state_dict(*arguments, **named)
        return {name: t for name, t in whole.items() if not name.startswith("head")}


class LeavesOutStatistics(zoo.Net):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        whole = super().state_dict(*arguments, **named)
        return {name: t for name, t in whole.items() if "running" not in name}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False)


class Note:
    pass


class Pickled(zoo.Net):
    def get_extra_state(self) -> Any:
        return {"note": Note()}

    def set_extra_state(self, state: Any) -> None:
        pass


class Forgetful(zoo.Net):
    """A model that returns an extra state and cannot load one."""

    def get_extra_state(self) -> Any:
        return 1


class Wide(zoo.Net):
    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.complex128))


class Growing(zoo.Net):
    """A model that makes a layer in its first forward pass."""

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        if not hasattr(self, "late"):
            self.late = nn.Linear(96, 96)
        return self.late(x)


def scripted(classes: int, channels: int) -> nn.Module:
    return torch.jit.script(zoo.Net(classes, channels))


def lazy(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def on_meta(classes: int, channels: int) -> nn.Module:
    with torch.device("meta"):
        return zoo.Net(classes, channels)


def restless(classes: int, channels: int) -> nn.Module:
    restless.width += 1  # type: ignore[attr-defined]
    width = restless.width  # type: ignore[attr-defined]
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, classes))


restless.width = 4  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "line"),
    [
        (Raising, r"fails in its first step: KeyError: 'features' \(test_dry_step.py, line \d+\)"),
        (Evaluating, r"fails in its first evaluation: AttributeError: .*never_set"),
        (Sparse, r"table.weight .* has a sparse gradient: build its layer with sparse=False"),
        (Copies, r"returns a copy of body.0.weight: what is saved would not be what is trained"),
        (LeavesOut, r"leaves out head.weight: what is saved would not be what is trained"),
        (LeavesOutStatistics, r"leaves out body.1.running_mean, which training changes"),
        (Pickled, r"get_extra_state of the module .* returns a test_dry_step.Note, which cannot"),
        (Forgetful, r"the weights that the state dict holds do not fit this model: .*_extra_state"),
        (Wide, r"wide of the model .* is complex128, which a .safetensors file cannot hold"),
        (Growing, r"the state dict holds after a step do not fit this model: .*late.weight"),
        (scripted, r"is TorchScript \(all of it\)"),
        (lazy, r"1.weight .* is lazy, without a shape yet: call the model once"),
        (on_meta, r"body.0.weight .* is on the meta device: dense tensors are needed"),
        (restless, r"makes a different model when it is called again \(1.bias differs\)"),
    ],
)
def test_a_model_that_would_fail_later_is_refused(
    build: Callable[..., nn.Module], line: str, job_of: Callable[..., Job]
) -> None:
    with pytest.raises(UserError, match=line) as error:
        warnings_of(job_of(build))
    assert "\n" not in str(error.value)


class Counting(zoo.Net):
    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.steps = 0
        self.noise = torch.Generator().manual_seed(1)
        self.features_seen: Tensor | None = None

    def features(self, images: Tensor) -> Tensor:
        self.steps += self.training
        x = super().features(images)
        self.features_seen = x  # a result that a user keeps, and no state
        return x + 0.01 * torch.randn(x.shape, generator=self.noise)


class CountingInState(Counting):
    def get_extra_state(self) -> Any:
        return {"steps": self.steps, "noise": self.noise.get_state()}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]
        self.noise.set_state(state["noise"])


def test_state_outside_the_state_dict_is_warned_of(job_of: Callable[..., Job]) -> None:
    (warning,) = warnings_of(job_of(Counting))
    assert "a step changes steps, noise of the model built_here:build" in warning
    assert "\n" not in warning
    assert warnings_of(job_of(CountingInState)) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "build",
    [
        zoo.Net,
        zoo.old_weight_norm,
        zoo.pruned,
        zoo.frozen_batch_norm,
        zoo.gradient_mask,
        zoo.dropping,
        zoo.Complex,
        zoo.Spectral,
        lambda classes, channels: zoo.Spectral(classes, channels, old=True),
        zoo.swin_v2,
        zoo.densenet,
    ],
)
def test_a_model_that_can_be_trained_passes_and_one_like_it_is_returned(
    build: Callable[..., nn.Module], job_of: Callable[..., Job]
) -> None:
    job = job_of(build)
    model = job.build()
    before = tiny.weights(model)
    kept, warnings = tried(job, model)
    assert not warnings and torch.equal(tiny.weights(kept), before)
    assert all(p.grad is None for p in kept.parameters())


def test_the_copy_has_the_hooks_of_its_builder_on_its_own_parameters(
    job_of: Callable[..., Job],
) -> None:
    job = job_of(zoo.gradient_mask)
    model = job.build()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    copy = job.copy_of(model)
    assert torch.equal(tiny.weights(copy), tiny.weights(model))
    copy(torch.randn(4, 3, 8, 8)).square().sum().backward()
    head: Any = copy.head
    assert (head.weight.grad[:, :48] == 0).all() and (head.weight.grad[:, 48:] != 0).any()
    assert all(p.grad is None for p in model.parameters())


class Sparsely(zoo.Net):
    """A model with attributes whose changes nothing cheap can show."""

    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.graph = torch.eye(4).to_sparse()
        self.awkward = Awkward()


class Awkward:
    def __len__(self) -> int:
        raise TypeError("sparse array length is ambiguous")


def half(classes: int, channels: int) -> nn.Module:
    net = zoo.Net(classes, channels)
    net.extra = nn.Parameter(torch.zeros(classes, dtype=torch.float16))
    net.head.register_forward_hook(lambda module, inputs, outputs: outputs + net.extra)
    return net


@pytest.mark.parametrize(
    ("build", "kind"), [(half, "extra .* float16"), (zoo.Complex, "complex64")]
)
def test_weights_whose_gradients_cannot_be_scaled_are_refused_in_fp16(
    build: Callable[..., nn.Module], kind: str, job_of: Callable[..., Job]
) -> None:
    assert warnings_of(job_of(build)) == []
    with pytest.raises(UserError, match=f"{kind}, whose gradients torch does not scale"):
        warnings_of(job_of(build, precision="fp16"))


EMPTY: dict[str, int] = {}


@pytest.mark.parametrize("fails_in", ["training", "test"])
def test_batches_of_ones_own_that_fail_at_once_are_wrong_input(fails_in: str) -> None:
    def function(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for pick in picks:
            size = len(pick.indices)
            if training == (fails_in == "training"):
                EMPTY["label"]
            yield torch.zeros(size, 3, 8, 8), torch.zeros(size, dtype=torch.int64)

    split = Batches(101, function)
    job = Job(tiny.recipe(), Dataset(split, split, tuple("abc")), tiny.CPU)
    place = r"failed: KeyError: 'label' \(test_dry_step.py, line \d+\)$"
    with pytest.raises(UserError, match=f"^the function that makes {fails_in} batches {place}"):
        tried(job, tiny.model(job))


def test_attributes_of_any_kind_are_passed_over(job_of: Callable[..., Job]) -> None:
    assert warnings_of(job_of(Sparsely)) == []


class Backbone(nn.Module):
    """A body that its builder returns in evaluation mode, as pretrained models come."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.net = zoo.Net(classes, channels).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def test_a_model_is_built_in_training_mode(job_of: Callable[..., Job]) -> None:
    """What is frozen then does not depend on whether this process trained an earlier phase."""
    assert all(module.training for module in job_of(Backbone).build().modules())


def test_the_last_model_of_the_builder_is_the_one_that_is_trained(
    job_of: Callable[..., Job],
) -> None:
    """A user's loss may refer to that model."""
    built: list[nn.Module] = []

    def build(classes: int, channels: int) -> nn.Module:
        built.append(zoo.Net(classes, channels))
        return built[-1]

    job = job_of(build)
    kept, _ = tried(job, job.build())
    assert kept is built[-1]
