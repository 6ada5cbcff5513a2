"""`Section`: what all tables of a TOML file have in common."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A table of a TOML file: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a field takes numbers: for Python they are 1 and 0."""
        if _holds_truth_value(value):
            kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
            if _is_among(kinds, int, float) and not _is_among(kinds, bool, Any):
                several = isinstance(value, list | tuple)
                raise ValueError(f"needs {'numbers' if several else 'a number'}, not true or false")
        return value


def _holds_truth_value(value: Any) -> bool:
    """Tell whether a value is true or false, or a list that holds one; tables check themselves."""
    if isinstance(value, list | tuple):
        return any(map(_holds_truth_value, value))
    return isinstance(value, bool)


def _kinds_in(annotation: Any) -> list[Any]:
    """Return the types that the type of a field is made of."""
    inner = get_args(annotation)
    return [kind for each in inner for kind in _kinds_in(each)] if inner else [annotation]


def _is_among(kinds: list[Any], *wanted: Any) -> bool:
    return any(kind is each for kind in kinds for each in wanted)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that the type of a field names, also within unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in models_in(each)]
