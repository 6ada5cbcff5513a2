"""What clipping and loss scaling tell: lines of metrics, lines for a person."""

import io

import pytest
import tiny
from rich.console import Console

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Memory
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.display import Display
from swap_hpc.run.journal import epoch_fields
from swap_hpc.train.events import Epoch, Evaluation
from swap_hpc.train.updates import NO_UPDATES, Read, Updates

OVERFLOW = Read(norm=float("nan"), is_clipped=False, is_skipped=True, loss_scale=512.0)


def epoch(updates: Updates) -> Epoch:
    means = Evaluation(1.0, {"accuracy": 0.5})
    return Epoch(PHASE_1, 1, 1, 0.1, means, None, 96, 1.0, 0.0, Memory(0), False, updates)


def test_a_skipped_steps_norm_does_not_count() -> None:
    updates = NO_UPDATES
    for norm, is_clipped in ((1.0, False), (4.0, True)):
        updates = updates.plus(OVERFLOW).plus(Read(norm, is_clipped, False, 512.0))
    line = epoch_fields(epoch(updates))
    assert line["gradient_norm"] == 2.5 and line["gradient_norm_max"] == 4.0
    assert line["clipped_steps"] == 1
    assert line["skipped_steps"] == 2 and line["loss_scale"] == 512.0
    only_overflows = epoch_fields(epoch(NO_UPDATES.plus(OVERFLOW)))
    assert only_overflows["gradient_norm"] is None and only_overflows["skipped_steps"] == 1


def test_a_line_has_no_field_of_what_the_recipe_does_not_ask_for() -> None:
    plain = epoch_fields(epoch(NO_UPDATES.plus(Read(None, False, False, None))))
    asked_for = epoch_fields(epoch(NO_UPDATES.plus(OVERFLOW)))
    new = {"gradient_norm", "gradient_norm_max", "clipped_steps", "skipped_steps", "loss_scale"}
    assert asked_for.keys() - plain.keys() == new


def test_skipped_steps_are_told() -> None:
    screen, alone = io.StringIO(), Team.alone()
    ranks = Ranks(alone, alone, alone, (0,))
    display = Display(tiny.recipe(precision="fp16"), ranks, Console(file=screen))
    display.epoch(epoch(NO_UPDATES.plus(Read(None, False, False, 1024.0))))
    assert "skipped" not in screen.getvalue()
    display.epoch(epoch(NO_UPDATES.plus(OVERFLOW)))
    assert screen.getvalue().endswith(
        "large_batch skipped 1 step in epoch 1: gradients overflowed float16; "
        "the loss scale is now 512\n"
    )


@pytest.mark.parametrize("value", [0, -1.0, "much"])
def test_a_gradient_is_clipped_to_a_positive_norm(value: object) -> None:
    with pytest.raises(UserError, match="optimizer.clip_norm"):
        tiny.recipe(optimizer={"clip_norm": value})
