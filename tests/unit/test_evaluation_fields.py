"""The fields of an evaluation, as files and `--json` hold them."""

import json

from swap_hpc.run.lines import figures, without_nan
from swap_hpc.train.events import Evaluation


def test_a_number_that_is_not_finite_is_null_in_json() -> None:
    found = Evaluation(float("inf"), {"r2": float("nan"), "mae": 0.5}, {"mae": [0.5, None]})
    fields = without_nan(figures("test", found, ["r2", "mae"]))
    text = json.dumps(fields, allow_nan=False)
    assert json.loads(text) == {
        "test_loss": None,
        "test_r2": None,
        "test_mae": 0.5,
        "test_mae_by_class": [0.5, None],
    }
