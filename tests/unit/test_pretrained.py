"""Pretrained weights of torchvision and timm, from caches and files on this machine."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Model
from swap_hpc.run.fitting import load_foreign_
from swap_hpc.train import models
from swap_hpc.train.pretrained import pretrained

SHUFFLE = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
TINY = "mobilenetv3_small_050"


def scrambled(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of the model's shapes in which no tensor is as initialised."""
    torch.manual_seed(1)
    return {
        name: torch.rand_like(t) + 0.5 if t.is_floating_point() else t + 3
        for name, t in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def shuffle() -> dict[str, Tensor]:
    return scrambled(torchvision.models.shufflenet_v2_x0_5())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty, in an environment without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def begun(classes: int, channels: int = 3, **fields: Any) -> tuple[nn.Module, list[str]]:
    """Return a model that begins with pretrained weights, and what a person reads."""
    settings = Model.model_validate(fields)
    model = models.build(settings, classes, channels, seed=0)
    found = pretrained(settings, model, classes, channels)
    return model, load_foreign_(model, found.state, found.source, found.head)


def differing(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    return [name for name, t in model.state_dict().items() if not torch.equal(t, state[name])]


@pytest.mark.parametrize(
    "wanted", [True, "IMAGENET1K_V1", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"]
)
def test_torchvisions_weights_come_with_a_new_head(
    wanted: bool | str, cache: Path, shuffle: dict[str, Tensor]
) -> None:
    torch.save(shuffle, cache / Path(SHUFFLE.url).name)
    fields: dict[str, Any] = {"name": "torchvision:shufflenet_v2_x0_5", "pretrained": wanted}
    model, notes = begun(10, **fields)
    fresh = models.build(Model.model_validate(fields), 10, 3, seed=0).state_dict()
    assert differing(model, shuffle) == ["fc.weight", "fc.bias"]
    assert differing(model, shuffle | {n: fresh[n] for n in ("fc.weight", "fc.bias")}) == []
    source = "torchvision:shufflenet_v2_x0_5 (IMAGENET1K_V1)"
    assert notes == [f"{source}: fc.weight, fc.bias not loaded, left as initialised"]


def test_a_head_for_as_many_classes_is_loaded(cache: Path, shuffle: dict[str, Tensor]) -> None:
    torch.save(shuffle, cache / Path(SHUFFLE.url).name)
    model, notes = begun(1000, name="torchvision:shufflenet_v2_x0_5", pretrained=True)
    assert differing(model, shuffle) == [] and notes == []


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('executed', 'w')",)


def test_nothing_in_a_cached_file_is_executed(
    cache: Path, shuffle: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    torch.save(shuffle | {"x": Malicious()}, cache / Path(SHUFFLE.url).name)
    with pytest.raises(UserError, match=r"\(the file wants to run code\)"):
        begun(10, name="torchvision:shufflenet_v2_x0_5", pretrained=True)
    assert not (cache / "executed").exists()


WRONG = [
    (
        {"name": "torchvision:shufflenet_v2_x0_5", "pretrained": True},
        r"the pretrained weights of torchvision:shufflenet_v2_x0_5 \(IMAGENET1K_V1\) could not be "
        r"loaded \(URLError: .*\): fetch them where there is a network, .*, with python -c "
        r"\"import torchvision; .*'shufflenet_v2_x0_5', weights='IMAGENET1K_V1'\)\", or name a "
        "file in model.weights$",
    ),
    (
        {"name": "torchvision:shufflenet_v2_x0_5", "pretrained": "V2"},
        "torchvision has no weights 'V2' of shufflenet_v2_x0_5; it has IMAGENET1K_V1$",
    ),
    ({"name": f"timm:{TINY}", "pretrained": "v2"}, f"no weights 'v2' of {TINY}; it has lamb_in1k$"),
    ({"name": "timm:resnet10", "pretrained": True}, "timm has no model 'resnet10'"),
    ({"name": "timm:darknet17", "pretrained": True}, "timm has no pretrained weights of darknet17"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_cannot_be_had_is_told_in_one_line(
    fields: dict[str, Any], message: str, cache: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        begun(10, **fields)
    assert "\n" not in str(error.value)


def test_models_whose_input_depends_on_the_weights_are_refused() -> None:
    model = nn.Module()
    model.transform_input = False  # type: ignore[assignment]
    settings = Model.model_validate({"name": "torchvision:googlenet", "pretrained": True})
    with pytest.raises(UserError, match="pretrained googlenet changes its input"):
        pretrained(settings, model, 10, 3)


@pytest.mark.parametrize("wanted", [True, "lamb_in1k"])
def test_timms_weights_are_fitted_to_channels_and_classes(
    wanted: bool | str, tmp_path: Path
) -> None:
    whole = scrambled(timm.create_model(TINY))
    save_file(whole, tmp_path / "x.safetensors")
    where = {"pretrained_cfg_overlay": {"file": str(tmp_path / "x.safetensors")}}
    model, notes = begun(10, channels=1, name=f"timm:{TINY}", pretrained=wanted, **where)
    head, stem = ["classifier.weight", "classifier.bias"], "conv_stem.weight"
    assert differing(model, whole | {stem: model.state_dict()[stem]}) == head
    gray = whole[stem].sum(1, keepdim=True)  # as timm does it
    assert torch.allclose(model.state_dict()[stem], gray)
    source = f"timm:{TINY} (lamb_in1k)" if wanted is True else f"timm:{TINY}.lamb_in1k"
    assert notes == [f"{source}: {', '.join(head)} not loaded, left as initialised"]


def test_a_function_of_the_users_own_gets_the_field_as_an_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tiny

    seen = []

    def build(classes: int, channels: int, pretrained: bool) -> nn.Module:
        seen.append(pretrained)
        return tiny.plain(classes, channels)

    monkeypatch.setattr(tiny, "own", build, raising=False)
    for wanted in (True, False):
        models.build(Model(name="tiny:own", pretrained=wanted), 3, 3, 0)
    assert seen == [True, False]
