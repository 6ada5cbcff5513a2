"""Every optimizer that a recipe can name: its defaults, its steps, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.errors import UserError
from swap_hpc.recipe.loading import recipe_of
from swap_hpc.recipe.optimizer import DEFAULTS, Optimizer
from swap_hpc.train.lamb import Lamb
from swap_hpc.train.optimizers import OWN, build_optimizer, optimizer_class, torch_optimizers

OF_TORCH = torch_optimizers()
CONSTANT = {"large_batch": {"learning_rate": 0.1}, "refine": {"learning_rate": 0.1}}  # for Rprop
TESTS = Path(__file__).parents[1]


def net() -> nn.Sequential:
    """Return a model of matrices alone, which Muon can train, too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        inputs = torch.rand(6, 5, generator=generator)
        labels = torch.randint(0, 3, (6,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return tiny.weights(model)


def section(**fields: Any) -> Optimizer:
    return tiny.recipe(optimizer=fields, **CONSTANT).optimizer


def test_the_list_of_torchs_classes_is_long() -> None:
    assert {"SGD", "Adam", "AdamW", "RAdam", "Muon", "Rprop", "Adafactor"} <= set(OF_TORCH)
    assert not {"LBFGS", "SparseAdam", "Optimizer"} & set(OF_TORCH)


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_class_of_torch_steps_as_torchs_own(name: str) -> None:
    """With the class's own defaults: equal to the bit."""
    model, reference = net(), net()
    expected = stepped(reference, getattr(torch.optim, name)(reference.parameters(), lr=0.1))
    assert torch.equal(stepped(model, build_optimizer(model, section(name=name))), expected)


def test_settings_and_arguments_reach_the_class() -> None:
    recipe = section(
        name="AdamW",
        weight_decay=0.3,
        fused=True,
        arguments={"betas": [0.8, 0.9], "eps": 1e-4, "amsgrad": True},
    )
    (group,) = build_optimizer(net(), recipe).param_groups
    assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-4 and group["amsgrad"] is True
    assert group["weight_decay"] == 0.3 and group["fused"] is True and group["lr"] == 0
    with_momentum = section(name="RMSprop", momentum=0.7)
    assert build_optimizer(net(), with_momentum).param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_recipe_tells_the_defaults_of_its_optimizer(name: str) -> None:
    recipe = section(name=name)
    for field, value in DEFAULTS[name].items():
        assert getattr(recipe, field) == value
    (group,) = build_optimizer(net(), recipe).param_groups
    for field, value in DEFAULTS[name].items():
        assert group[field] == (value or None)


@pytest.mark.parametrize(
    "fields",
    [
        *({"name": name} for name in (*DEFAULTS, *OF_TORCH)),
        {"name": "sgd", "momentum": 0.5, "nesterov": False, "weight_decay": 0.0},
        {"name": "lamb", "arguments": {"betas": [0.9, 0.95]}, "decay_vectors": False},
        {"name": "own_optimizers:Odd", "arguments": {"scale": 0.5}, "layer_decay": 0.75},
        {
            "name": "adamw",
            "groups": [
                {"match": "*.bias", "weight_decay": 0.0},
                {"match": ["0.*", "1.*"], "frozen": True},
                {"match": "*", "learning_rate_scale": 0.1, "arguments": {"eps": 1e-6}},
            ],
        },
    ],
    ids=str,
)
def test_a_written_recipe_means_the_same(fields: dict[str, Any]) -> None:
    recipe = tiny.recipe(optimizer=fields, **CONSTANT)
    assert recipe_of(recipe.to_toml(), "recipe.toml") == recipe


def test_recipes_that_earlier_versions_wrote_mean_what_they_meant() -> None:
    written = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay_vectors": True}
    written |= {"trust": 0.001, "fused": False}
    assert section(name="sgd", **written) == Optimizer()
    assert section(name="lars", **written) == Optimizer(name="lars")


def lamb_by_hand(
    w: Tensor, gradients: list[Tensor], rate: float, decay: float, adapts: bool
) -> Tensor:
    """Algorithm 2 of arXiv 1904.00962 with explicit sums instead of running means, in float64."""
    for t in range(1, len(gradients) + 1):
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        weights1, weights2 = 0.1 * 0.9**ages, 0.01 * 0.99**ages
        seen = torch.stack(gradients[:t])
        m = torch.tensordot(weights1, seen, 1) / weights1.sum()
        v = torch.tensordot(weights2, seen**2, 1) / weights2.sum()
        r = m / (v.sqrt() + 1e-6) + decay * w
        norms = w.square().sum().sqrt(), r.square().sum().sqrt()
        ratio = float(norms[0] / norms[1]) if adapts and min(norms) > 0 else 1.0
        w = w - rate * ratio * r
    return w


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("begins_at_zero", [True, False])
def test_lamb_is_its_definition(adapts: bool, begins_at_zero: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4, 7, generator=generator).double() * (not begins_at_zero)
    gradients = [torch.randn(4, 7, generator=generator).double() for _ in range(6)]
    p = nn.Parameter(w.clone())
    lamb = Lamb([p], lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, layer_adaptation=adapts)
    for gradient in gradients:
        p.grad = gradient
        lamb.step()
    expected = lamb_by_hand(w, gradients, 0.02, 0.1, adapts)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


def test_lamb_leaves_zero_gradients_and_zero_weights_alone() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.zeros(3)
    Lamb([p], lr=1.0).step()
    assert torch.equal(p, torch.zeros(3))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "adamw", "momentum": 0.9}, "momentum belongs to sgd and lars: adamw has none; its"),
    ({"name": "lamb", "nesterov": False}, "nesterov belongs to sgd and lars: lamb has none"),
    ({"name": "sgd", "trust": 0.01}, "trust belongs to lars: sgd has none"),
    ({"name": "RAdam", "trust": 0.01}, "trust belongs to lars: RAdam has none"),
    ({"name": "lars", "fused": True}, "fused belongs to sgd and adamw: lars has none"),
    ({"name": "RAdam", "momentum": 0.9}, "optimizer.momentum: RAdam does not take it"),
    ({"name": "Rprop", "weight_decay": 0.1}, "optimizer.weight_decay: Rprop does not take it"),
    ({"name": "Rprop", "decay_vectors": False}, "Rprop has no weight decay: nothing to set or"),
    ({"name": "RAdam", "arguments": {"beta": 1}}, "arguments.beta: RAdam takes betas, capturable"),
    ({"name": "adamw", "arguments": {"lr": 1}}, "arguments.lr: set it by the phase's learning"),
    ({"arguments": {"momentum": 1}}, "arguments.momentum: set it by optimizer.momentum"),
    ({"name": "adamw", "arguments": {"eps": -1.0}}, "optimizer adamw: Invalid epsilon value"),
    ({"name": "adamw", "arguments": {"betas": 3}}, "the optimizer adamw: "),
    ({"name": "lamb", "arguments": {"betas": [0.9]}}, "optimizer lamb: betas are two numbers"),
    (
        {"name": "adam"},
        r"no optimizer adam; is it Adam\? Known are sgd, lars, lamb, adamw, of torch",
    ),
    ({"name": "Lion"}, r"no optimizer Lion\. Known are .*Adafactor, Adagrad"),
    ({"name": "LBFGS"}, "LBFGS cannot be used: it computes the loss several times"),
    ({"name": "SparseAdam"}, "SparseAdam cannot be used: it takes sparse gradients only"),
    ({"name": "Muon"}, "the optimizer Muon: Muon only supports 2D parameters"),
    ({"name": "../adam"}, "optimizer.name: needs sgd, lars, lamb, adamw, a class of torch.optim"),
    ({"name": "own_optimizers:Closing"}, r"computes the loss several times per step \(closure\)"),
    ({"name": "own_optimizers:ScheduleFree"}, "other weights than are evaluated"),
    ({"name": "own_optimizers:not_a_class"}, "is not a class derived from torch.optim.Optimizer"),
    ({"name": "own_optimizers:Gone"}, "own_optimizers has no Gone; it has Odd, .*Closing"),
    ({"name": "nowhere:Gone"}, "the optimizer nowhere:Gone cannot be imported"),
    ({"weight_decay": 0.0, "decay_vectors": False}, "nothing is decayed, weight_decay is 0"),
    ({"name": "Adam", "decay_vectors": False}, "nothing is decayed, weight_decay is 0"),
    ({"layer_decay": 1.0}, "optimizer.layer_decay: "),
    (
        {"name": "adamw", "groups": [{"match": "*", "arguments": {"eps": -1.0}}]},
        "the optimizer adamw: Invalid epsilon value",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_what_cannot_work_is_one_line_before_training(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_optimizer(tiny.model(tiny.job()), section(**fields))
    assert "\n" not in str(error.value)


# A value of each field that is no optimizer's default; `clip_norm` has tests of its own.
OTHER_VALUES: dict[str, Any] = {
    "momentum": 0.3,
    "nesterov": True,
    "weight_decay": 0.37,
    "decay_vectors": False,
    "trust": 0.5,
    "fused": True,
    "layer_decay": 0.5,
    "arguments": {"eps": 0.01},
    "groups": [{"match": "2.*", "learning_rate_scale": 0.5}],
}


def test_every_field_is_tried_below() -> None:
    assert OTHER_VALUES.keys() | {"name", "clip_norm"} == Optimizer.model_fields.keys()


@pytest.mark.parametrize("field", OTHER_VALUES)
@pytest.mark.parametrize("name", [*DEFAULTS, *OF_TORCH])
def test_a_field_changes_the_optimizer_or_is_refused(name: str, field: str) -> None:
    """No field is accepted and has no effect, whatever the optimizer."""
    model = net()
    if name != "Muon":
        model = nn.Sequential(*model, nn.Linear(3, 3))
    momentum = {"momentum": 0.9} if (name, field) == ("SGD", "nesterov") else {}
    plain = described(build_optimizer(model, section(name=name, **momentum)))
    if plain[0].get(field) is True and isinstance(OTHER_VALUES[field], bool):
        value: Any = False  # the default is true
    else:
        value = OTHER_VALUES[field]
    try:
        recipe = section(name=name, **momentum, **{field: value})
        assert described(build_optimizer(model, recipe)) != plain
    except UserError as error:
        assert field in str(error) or name in str(error)


def described(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for _ in group["params"]
    ]


def test_rprop_takes_a_constant_rate() -> None:
    constant = {"epochs": 1, "learning_rate": {"shape": "constant", "peak": 0.1}}
    phases: dict[str, Any] = {"large_batch": constant, "refine": {"learning_rate": 0.1}}
    assert tiny.recipe(optimizer={"name": "Rprop"}, **phases).optimizer.name == "Rprop"
    phases["refine"] = {"learning_rate": [[0, 0.1], [1, 0.0]]}
    for name in ("Rprop", "torch.optim:Rprop"):
        with pytest.raises(UserError, match="refine.learning_rate changes, but Rprop takes"):
            tiny.recipe(optimizer={"name": name}, **phases)


def test_unknown_names_and_arguments_are_found_without_a_model() -> None:
    for fields in ({"name": "adam"}, {"name": "RAdam", "arguments": {"beta": 1}}):
        with pytest.raises(UserError, match="RAdam"):
            optimizer_class(section(**fields))
    assert OWN.keys() == DEFAULTS.keys()


STARTS = """
import sys
from unit import test_optimizer_classes as t
from swap_hpc.train.state import optimizer_state
for name in (*t.DEFAULTS, *t.OF_TORCH):
    model = t.net()
    optimizer = t.build_optimizer(model, t.Optimizer.model_validate({"name": name}))
    t.stepped(model, optimizer)
    optimizer_state(optimizer, model)
    assert "torch._dynamo" not in sys.modules, name
"""


def test_no_optimizer_imports_torchs_compiler() -> None:
    """It would add seconds to the start of each rank."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", STARTS]
    done = subprocess.run(
        line, cwd=TESTS, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
