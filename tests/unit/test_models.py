"""Models: the builders that a recipe can name, and what is refused."""

import pytest
import torch

from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Model
from swap_hpc.train import models

NARROW = Model.model_validate({"name": "resnet9", "width": 4})


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet9_takes_small_images(size: int, channels: int) -> None:
    model = models.build(NARROW, classes=7, channels=channels, seed=0)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_resnet9_is_the_papers_at_width_64() -> None:
    """It has 6.57 million parameters, as the network published for CIFAR-10."""
    model = models.build(Model(name="resnet9"), classes=10, channels=3, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 6_573_120


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (list(models.build(NARROW, 10, 3, s).parameters()) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_models_get_the_right_number_of_classes(name: str) -> None:
    model = models.build(Model(name=f"torchvision:{name}"), 7, 3, 0).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


WRONG = [
    ({"name": "resnet10"}, 'unknown model \'resnet10\': "resnet9", "torchvision:NAME"'),
    ({"name": "torchvision:resnet5"}, "torchvision has no classification model 'resnet5'"),
    (
        {"name": "nowhere.nets:build"},
        "model nowhere.nets:build cannot be imported .*is it in this folder, or on PYTHONPATH",
    ),
    ({"name": "tiny:missing"}, "model tiny:missing: tiny has no missing; it has "),
    ({"name": "resnet9", "depth": 3}, "model resnet9 refuses its arguments: .*depth"),
    ({"name": "resnet9", "classes": 3}, "model resnet9 refuses its arguments: .*classes"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_model_is_answered_with_a_hint(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(Model.model_validate(fields), 10, 3, 0)


def test_timms_models_are_built_for_the_data() -> None:
    recipe = Model.model_validate({"name": "timm:resnet10t", "drop_rate": 0.1})
    model = models.build(recipe, 7, 1, 0).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match="timm has no model 'resnet10'"):
        models.build(Model(name="timm:resnet10"), 7, 1, 0)
