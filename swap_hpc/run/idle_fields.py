"""Fields of a recipe that have no effect on its model, which a run's first lines tell.

They are not refused, so that one field may change (`model.name`, `checkpoint.epochs`) and the
others stay. All other fields without an effect are refused: by the recipe itself, by
`data.fields.check_fields`, or where the optimizer is built.
"""

from torch import nn

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.average.modes import training_modules
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.section import Section


def idle_fields(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return a line for each section with fields that are set, but have no effect on a model.

    Args:
        recipe: the run's.
        model: as its builder made it.
    """
    lines = []
    if not _estimates_batchnorm(model):
        why = f"the model {recipe.model.name} has no batch norm that trains"
        if recipe.large_batch.epochs:
            fields = _given(recipe.large_batch, "batchnorm_batch_size")
            lines += _line("large_batch", fields, why)
        if recipe.refine.epochs:
            fields = _given(recipe.batchnorm, *type(recipe.batchnorm).model_fields)
            lines += _line("batchnorm", fields, why)
    if recipe.channels_last and all(p.dim() != 4 for p in model.parameters()):
        lines.append(
            f"channels_last has no effect: the model {recipe.model.name} has no two-dimensional "
            "convolution"
        )
    if recipe.checkpoint.epochs == 0:
        fields = _given(recipe.checkpoint, "min_seconds")
        why = "checkpoint.epochs = 0 asks for no save at the end of an epoch"
        lines += _line("checkpoint", fields, why)
    if recipe.unused_size:
        lines.append(recipe.unused_size)
    return lines


def _estimates_batchnorm(model: nn.Module) -> bool:
    training = training_modules(model)
    return any(layer in training for _, layer in batchnorm_layers(model))


def _given(section: Section, *names: str) -> list[str]:
    """Return the fields that differ from their defaults: a resolved recipe lists all of them."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _line(section: str, fields: list[str], why: str) -> list[str]:
    if not fields:
        return []
    names = " and ".join(f"{section}.{name}" for name in fields)
    return [f"{names} {'has' if len(fields) == 1 else 'have'} no effect: {why}"]
