"""Pretrained models of torchvision and timm, by the names that these packages give them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import NamedTuple

from torch import Tensor, nn

from swap_hpc.average.state import state_of
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Model
from swap_hpc.recipe.wording import shortened
from swap_hpc.train.models import timm_name

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch: load nothing that would run code


class Pretrained(NamedTuple):
    """The weights of a pretrained model.

    Attributes:
        source: for messages: "torchvision:resnet50 (IMAGENET1K_V2)".
        state: the state dict, see `state_of`.
        head: the names in it that depend on the number of classes, where that is another one.
    """

    source: str
    state: dict[str, Tensor]
    head: tuple[str, ...]


def pretrained(settings: Model, model: nn.Module, classes: int, channels: int) -> Pretrained:
    """Return the weights that torchvision or timm has for a model.

    They come from the package's cache on this machine, or are downloaded into it.

    Args:
        settings: name, arguments, and `pretrained`, of a model of torchvision or timm.
        model: as it was built for the data.
        classes: number of logits of `model`.
        channels: channels of an image.

    Raises:
        UserError: there are no such weights, or they cannot be loaded here.
    """
    package, _, name = settings.name.partition(":")
    if package == "timm":
        return _of_timm(settings, classes, channels)
    return _of_torchvision(settings, name, model, classes)


def _of_torchvision(settings: Model, name: str, model: nn.Module, classes: int) -> Pretrained:
    import torchvision

    if hasattr(model, "transform_input"):
        raise UserError(
            f"torchvision's pretrained {name} changes its input as its weights want it, and has "
            "further outputs: use another model, or timm's (timm:inception_v3)"
        )
    known = torchvision.models.get_model_weights(name)
    wanted = settings.pretrained
    chosen = "DEFAULT" if wanted is True else str(wanted).removeprefix(f"{known.__name__}.")
    if chosen not in known.__members__:
        there = ", ".join(each.name for each in known)
        raise UserError(f"torchvision has no weights {wanted!r} of {name}; it has {there}")
    weights = known[chosen]
    fetch = f"import torchvision; torchvision.models.get_model({name!r}, weights={weights.name!r})"
    source = f"{settings.name} ({weights.name})"
    with _loading(source, fetch):
        # The package's own builder also renames what old files name in another way.
        full = torchvision.models.get_model(
            name, weights=weights, progress=False, **settings.arguments
        )
    own, state = state_of(model), state_of(full)
    trained_on = len(weights.meta["categories"])
    head = [
        entry
        for entry, tensor in state.items()
        if entry in own
        and tensor.shape[:1] == (trained_on,)
        and own[entry].shape == (classes, *tensor.shape[1:])
    ]
    return Pretrained(source, state, tuple(head) if trained_on != classes else ())


def _of_timm(settings: Model, classes: int, channels: int) -> Pretrained:
    import timm

    name = timm_name(settings)
    if not timm.is_model_pretrained(name):
        raise UserError(f"timm has no pretrained weights of {name}; timm.list_pretrained() has all")
    usual = timm.get_pretrained_cfg(name)
    source = f"timm:{name} ({usual.tag})" if usual.tag and "." not in name else f"timm:{name}"
    with _loading(source, f"import timm; timm.create_model({name!r}, pretrained=True)"):
        # timm fits the first layer to the channels, and leaves out a head for other classes.
        full = timm.create_model(
            name, pretrained=True, num_classes=classes, in_chans=channels, **settings.arguments
        )
    state, found = state_of(full), full.pretrained_cfg
    layers = found.get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    head = [entry for entry in state if entry.rpartition(".")[0] in layers]
    return Pretrained(source, state, tuple(head) if found["num_classes"] != classes else ())


@contextmanager
def _loading(source: str, fetch: str) -> Iterator[None]:
    """Execute nothing of a file; turn an error into one line that says where to get the weights."""
    before = os.environ.get(FORCE, "")
    os.environ[FORCE] = "1"
    try:
        yield
    except Exception as error:  # of the package, of its network library, of torch
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        if isinstance(error, UnpicklingError):
            reason = "the file wants to run code"
        raise UserError(
            f"the pretrained weights of {source} could not be loaded ({reason}): fetch them where "
            f'there is a network, as on a login node, with python -c "{fetch}", '
            "or name a file in model.weights"
        ) from None
    finally:
        os.environ[FORCE] = before
