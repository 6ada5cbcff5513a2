"""A line of a run's metrics, as the journal writes it and the board shows it."""

from typing import Any

# Field -> value, one JSON object of `metrics/*.jsonl`. A line describes an epoch of a part of the
# run ("phase" is the part's phase), or an evaluation by all ranks ("phase" is "evaluation", and
# "model" names what was evaluated: "large_batch", "average" or "swap").
Line = dict[str, Any]
