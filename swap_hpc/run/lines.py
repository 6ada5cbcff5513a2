"""A line of a run's metrics, as the journal writes it and the board shows it."""

from collections.abc import Iterable
from math import isfinite
from typing import Any

from swap_hpc.train.events import Evaluation

# Field -> value, one JSON object of `metrics/*.jsonl`. A line describes an epoch of a part of the
# run ("phase" is the part's phase), or an evaluation by all ranks ("phase" is "evaluation", and
# "model" names what was evaluated: "large_batch", "average" or "swap").
Line = dict[str, Any]


def figures(split: str, result: Evaluation | None, metrics: Iterable[str]) -> Line:
    """Return the fields of a line that hold an evaluation, named `<split>_<metric>`.

    Args:
        split: "train", "validation" or "test".
        result: the evaluation; None: it was skipped, and all fields are None.
        metrics: the names of the run's metrics.
    """
    values = {"loss": None, **dict.fromkeys(metrics)} if result is None else _values(result)
    return {f"{split}_{name}": value for name, value in values.items()}


def _values(result: Evaluation) -> dict[str, Any]:
    each = {f"{name}_by_class": values for name, values in result.by_class.items()}
    return {"loss": result.loss, **result.metrics, **each}


def without_nan(value: Any) -> Any:
    """Return a value of JSON with null for each number that is not finite: JSON has none."""
    match value:
        case dict():
            return {name: without_nan(each) for name, each in value.items()}
        case list():
            return [without_nan(each) for each in value]
        case float() if not isfinite(value):
            return None
    return value


def evaluation_in(line: Line, split: str, metrics: Iterable[str]) -> Evaluation:
    """Return the evaluation that `figures` made fields of."""
    by_class = {name: line.get(f"{split}_{name}_by_class") for name in metrics}
    return Evaluation(
        line[f"{split}_loss"],
        {name: line[f"{split}_{name}"] for name in metrics},
        {name: values for name, values in by_class.items() if values is not None},
    )
