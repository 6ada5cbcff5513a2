"""What differs between a state dict and the model that it is loaded into, in words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from swap_hpc.recipe.wording import count, first_few


class Mismatch(NamedTuple):
    """Names of a state dict that does not fit a model.

    Attributes:
        shapes: names whose tensors have other shapes, with both shapes: given, wanted.
        missing: names of the model that the state dict lacks.
        unexpected: names of the state dict that the model lacks.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        parts = [
            f"{name} is {given} in them and {wanted} in the model"
            for name, (given, wanted) in [*self.shapes.items()][:3]
        ]
        if len(self.shapes) > 3:
            parts.append(f"{len(self.shapes) - 3:,} more of other shapes")
        if self.missing:
            parts.append(
                f"{count(len(self.missing), 'name')} of the model missing in them: "
                f"{first_few(self.missing)}"
            )
        if self.unexpected:
            parts.append(
                f"{count(len(self.unexpected), 'name')} unknown to the model: "
                f"{first_few(self.unexpected)}"
            )
        return "; ".join(parts)

    @property
    def patterns(self) -> list[str]:
        """Patterns that match all these names, such as "head.*": one for each module."""
        names = [*self.shapes, *self.missing, *self.unexpected]
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        return [f"{module}.*" if module else "*" for module in modules]


def mismatch(model: nn.Module, state: Mapping[str, Any]) -> Mismatch:
    """Return what differs between a state dict, its tied names filled in, and that of a model."""
    own = model.state_dict()
    shapes = {
        name: (tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in own.items()
        if isinstance(tensor, Tensor)
        and isinstance(state.get(name), Tensor)
        and state[name].shape != tensor.shape
    }
    # Files of old versions of torch lack the counter, and torch accepts that.
    counter = "num_batches_tracked"
    missing = [n for n in own if n not in state and n.rpartition(".")[2] != counter]
    return Mismatch(shapes, missing, [name for name in state if name not in own])
