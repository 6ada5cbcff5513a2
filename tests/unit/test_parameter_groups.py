"""Groups of parameters: by pattern, by layer, frozen, and vectors without weight decay."""

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from swap_hpc.average.agreement import weights_sha256
from swap_hpc.errors import UserError
from swap_hpc.parallel.gradients import gradient_buckets
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.optimizer import Optimizer
from swap_hpc.recipe.phase import PHASE_1, refinement_of
from swap_hpc.swap import swap
from swap_hpc.train.fit import fit
from swap_hpc.train.layers import layers_of
from swap_hpc.train.optimizers import build_optimizer
from swap_hpc.train.parameter_groups import SCALE

ONE = Team.alone()


class Block(nn.Module):
    """A block of a transformer, without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 2, 4))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(4)


class Transformer(nn.Module):
    """Blocks that lie two levels deep, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embedding = nn.Linear(3, 4)
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)


def section(**fields: Any) -> Optimizer:
    constant = {"learning_rate": 0.1}  # for Rprop
    return tiny.recipe(optimizer=fields, large_batch=constant, refine=constant).optimizer


def settings_by_name(model: nn.Module, recipe: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the settings of each parameter's group in the optimizer."""
    names = {p: name for name, p in model.named_parameters()}
    groups = build_optimizer(model, recipe).param_groups
    return {
        names[p]: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for p in group["params"]
    }


def test_the_first_group_that_matches_has_a_parameter() -> None:
    groups = [
        {"match": ["head.*"], "learning_rate_scale": 10.0},
        {"match": "encoder.blocks.[01].*", "arguments": {"eps": 1e-3, "betas": [0.5, 0.5]}},
        {"match": "*.bias", "weight_decay": 0.5},
    ]
    found = settings_by_name(Transformer(), section(name="adamw", weight_decay=0.1, groups=groups))
    assert len(found) == len(list(Transformer().parameters()))
    head, bias = found["head.bias"], found["embedding.bias"]
    assert (head[SCALE], head["weight_decay"], head["eps"]) == (10.0, 0.1, 1e-8)
    block = found["encoder.blocks.1.mlp.0.bias"]
    assert (block["eps"], block["betas"], block["weight_decay"]) == (1e-3, (0.5, 0.5), 0.1)
    assert bias["weight_decay"] == 0.5 and SCALE not in bias
    assert found["encoder.blocks.2.mlp.0.weight"]["weight_decay"] == 0.1


@pytest.mark.parametrize(("name", "plain"), [("lars", "trust"), ("lamb", "layer_adaptation")])
def test_vectors_are_spared(name: str, plain: str) -> None:
    groups = [{"match": "head.bias", "weight_decay": 0.3}]
    recipe = section(name=name, weight_decay=0.2, decay_vectors=False, groups=groups)
    found = settings_by_name(Transformer(), recipe)
    for parameter, p in Transformer().named_parameters():
        given = found[parameter]
        is_vector = p.ndim <= 1
        decay = 0.3 if parameter == "head.bias" else 0.0 if is_vector else 0.2
        assert given["weight_decay"] == decay, parameter
        assert bool(given[plain]) != is_vector, parameter


def test_the_layers_of_a_model_without_a_matcher() -> None:
    numbers = layers_of(Transformer())
    assert numbers.keys() == dict(Transformer().named_parameters()).keys()
    first_names = {"token": 0, "embedding": 0, "head": 5}
    for name, number in numbers.items():
        top, *rest = name.split(".")
        if top != "encoder":
            assert number == first_names[top], name
        elif rest[0] == "blocks":
            assert number == 1 + int(rest[1]), name
        else:
            assert number == {"position": 0, "norm": 4}[rest[0]], name


def test_the_layers_of_a_plain_sequence_and_of_tied_weights() -> None:
    assert layers_of(tiny.plain(3, 3)) == {"0.weight": 0, "0.bias": 0, "4.weight": 1, "4.bias": 1}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert layers_of(tied) == {"0.weight": 0, "0.bias": 0, "2.bias": 1}


def test_torchvisions_models_have_their_blocks_as_layers() -> None:
    from torchvision import models

    vit = models.VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8)
    numbers = layers_of(vit)
    assert numbers["class_token"] == numbers["conv_proj.weight"] == 0
    assert numbers["encoder.layers.encoder_layer_2.mlp.0.weight"] == 3
    assert numbers["heads.head.weight"] == max(numbers.values()) == 5
    resnet = layers_of(models.resnet18())
    assert [resnet[name] for name in ("conv1.weight", "layer1.1.conv1.weight", "fc.bias")] == [
        0,
        3,
        10,
    ]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_layer_decay_is_timms(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, pretrained=False)
    theirs = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.65)
    scale = {p: group["lr_scale"] for group in theirs for p in group["params"]}
    found = settings_by_name(model, section(name="adamw", layer_decay=0.65))
    for parameter, p in model.named_parameters():
        assert found[parameter].get(SCALE, 1.0) == pytest.approx(scale[p]), parameter


def test_the_rate_of_a_step_is_scaled_by_group_and_layer() -> None:
    """In one step of plain SGD every tensor moves by the scaled rate times its gradient."""
    groups = [{"match": "4.*", "learning_rate_scale": 0.5}]
    one_step = {"batch_size": 101, "epochs": 1, "learning_rate": 0.1}
    scaled, plain = (
        tiny.job(optimizer={"name": "SGD", **fields}, large_batch=one_step)
        for fields in ({"layer_decay": 0.25, "groups": groups}, {})
    )
    start = tiny.model(plain).state_dict()
    moves = []
    for job in (scaled, plain):
        model = tiny.model(job)
        for _ in fit(model, job, PHASE_1, ONE):
            pass
        moves.append({name: p - start[name] for name, p in model.state_dict().items()})
    for name, scale in (("0.weight", 0.25), ("0.bias", 0.25), ("4.weight", 0.5), ("4.bias", 0.5)):
        torch.testing.assert_close(moves[0][name], scale * moves[1][name], rtol=1e-4, atol=1e-7)


def test_frozen_parameters_stay_and_have_no_gradient() -> None:
    groups = [{"match": "0.*", "frozen": True}]
    job = tiny.job(
        model={"name": "tiny:batch_normed"}, optimizer={"name": "adamw", "groups": groups}
    )
    for part in (PHASE_1, refinement_of(0)):
        model, start = tiny.model(job), tiny.model(job).state_dict()
        for _ in fit(model, job, part, ONE):
            pass
        for name, p in model.named_parameters():
            assert torch.equal(p, start[name]) == name.startswith("0."), name
            assert (p.grad is None) == name.startswith("0."), name
        in_buckets = {p for bucket, _ in gradient_buckets(model) for p in bucket}
        assert in_buckets == {p for p in model.parameters() if p.requires_grad}


def test_frozen_parameters_are_the_same_in_the_average() -> None:
    """The mean of equal values is that value, to the bit."""
    job = tiny.job(groups=3, optimizer={"groups": [{"match": "0.*", "frozen": True}]})
    model, start = tiny.model(job), tiny.model(job).state_dict()
    with grid(ONE, 3) as ranks:
        for _ in swap(model, job, ranks):
            pass
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("0."), name


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(UserError, match="layer_decay: the model has one layer,"):
        build_optimizer(nn.Linear(3, 3), section(layer_decay=0.5))


def test_a_group_without_an_effect_changes_nothing() -> None:
    """The same weights to the bit, though torch sees two groups."""
    hashes = set()
    for groups in ([], [{"match": "4.*", "arguments": {"betas": [0.9, 0.999]}}]):
        job = tiny.job(optimizer={"name": "adamw", "groups": groups})
        model = tiny.model(job)
        for _ in fit(model, job, PHASE_1, ONE):
            pass
        hashes.add(weights_sha256(model))
    assert len(hashes) == 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"groups": [{"match": "hed.*", "weight_decay": 0}]}, 'match = "hed.[*]" matches none of the'),
    ({"groups": [{"match": "hed.*", "weight_decay": 0}]}, "0.weight, 0.bias, 4.weight, 4.bias"),
    (
        {"groups": [{"match": "4.*"}, {"match": "4.bias", "weight_decay": 0}]},
        'all that match = "4.bias" matches belongs to an earlier group',
    ),
    ({"groups": [{"match": "*", "frozen": True}]}, "freezes all parameters: nothing is left"),
    ({"groups": [{"match": []}]}, r"optimizer.groups.match \(item 1\): needs at least 1 item"),
    ({"groups": [{"weight_decay": 0}]}, r"optimizer.groups.match \(item 1\) is missing"),
    (
        {"groups": [{"match": "4.*", "decay": 0}]},
        r"unknown field optimizer.groups.decay \(item 1\); valid here: match, learning_rate_scale",
    ),
    (
        {"groups": [{"match": "4.*", "frozen": True, "weight_decay": 0.1}]},
        "weight_decay has no effect with frozen = true: leave it out",
    ),
    (
        {"groups": [{"match": "4.*", "arguments": {"lr": 1}}]},
        "arguments.lr: set it by the group's learning_rate_scale",
    ),
    (
        {"name": "adamw", "groups": [{"match": "4.*", "arguments": {"beta": 1}}]},
        "optimizer.arguments.beta: adamw takes amsgrad, betas",
    ),
    (
        {"layer_decay": 0.5, "groups": [{"match": "gone"}]},
        'match = "gone" matches none of the 4 parameters',
    ),
    (
        {"name": "Rprop", "groups": [{"match": "4.*", "weight_decay": 0.1}]},
        "Rprop has no weight decay",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_group_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_optimizer(tiny.model(tiny.job()), section(**fields))
    assert "\n" not in str(error.value)
