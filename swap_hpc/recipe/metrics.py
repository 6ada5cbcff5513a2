"""The metrics that a recipe names, and how each is named and shown. Imports no torch."""

from math import isnan
from typing import Annotated, Any

from pydantic import WithJsonSchema, model_serializer, model_validator

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import MetricName

# The built-in metrics. All are shares, in [0, 1], and are shown in percent.
SHARES = ("accuracy", "top5", "class_accuracy")

# `train_seconds` and the losses stand beside the metrics in files.
TAKEN = ("loss", "seconds")


class MetricChoice(Section):
    """A metric, and which way it is better. In TOML its name alone, or a table."""

    name: MetricName
    """`accuracy`, `top5`, `class_accuracy` or `package.module:function`."""
    smaller_is_better: bool = False
    """Smaller values are better, as of an error."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> Any:
        if not self.smaller_is_better:
            return self.name
        return {"name": self.name, "smaller_is_better": True}

    @model_validator(mode="after")
    def _fits(self) -> "MetricChoice":
        if self.smaller_is_better and self.key in SHARES:
            raise ValueError(f"of {self.name}, larger values are better")
        if self.key in TAKEN:
            raise ValueError(f"{self.name}: a metric must not be named {self.key}: rename it")
        return self

    @property
    def key(self) -> str:
        """The metric's name in tables and files: that of the function."""
        return self.name.rpartition(":")[2]

    def better(self, value: float, than: float) -> bool:
        """Tell whether a value is better than another one; equal values are not, nor is NaN."""
        if isnan(value) or isnan(than):
            return isnan(than) and not isnan(value)
        return value < than if self.smaller_is_better else value > than


# The description for the page of fields: a metric may be written as its name.
_LISTED = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}

Metrics = Annotated[tuple[MetricChoice, ...], WithJsonSchema(_LISTED)]


def checked_metrics(metrics: Metrics) -> Metrics:
    """Return `metrics`; ValueError where there is none, or two have one name."""
    if not metrics:
        raise ValueError('needs at least one metric, as in ["accuracy"]')
    keys = [metric.key for metric in metrics]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"two metrics are named {twice[0]}: give each function its own name")
    return metrics


def as_list(value: Any) -> Any:
    """Return one metric as a list of it; ValueError where it is something else."""
    if not isinstance(value, str | dict | list | tuple):
        raise ValueError('needs a list of metrics, as in ["accuracy"]')
    return [value] if isinstance(value, str | dict) else value


def metric_names(result: dict[str, Any]) -> list[str]:
    """Return the metrics in what `result.json` holds, the main one first."""
    names = [key.removeprefix("test_") for key in result if key.startswith("test_")]
    return [name for name in names if name != "loss"]


def scale(name: str) -> float:
    """Return the factor by which a metric is shown: 100, for percent, or 1."""
    return 100.0 if name in SHARES else 1.0


def heading(name: str) -> str:
    """Return a metric's name with its unit: "accuracy %"."""
    return f"{name} %" if name in SHARES else name


def axis_label(split: str, name: str) -> str:
    """Return the label of an axis: "test accuracy (%)"."""
    return f"{split} {name} (%)" if name in SHARES else f"{split} {name}"


def shown(name: str, value: float | None) -> str:
    """Return a value for a column under `heading`: two decimals of percent, or six digits."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if name in SHARES else f"{value:.6g}"


def with_unit(name: str, value: float) -> str:
    """Return a value that stands alone: "97.50 %"."""
    return f"{shown(name, value)} %" if name in SHARES else shown(name, value)
