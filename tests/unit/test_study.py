"""Studies: the shipped ones, what a file may say, and the table that is made of results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swap_hpc.errors import RunError, UserError
from swap_hpc.study import numbers
from swap_hpc.study import page as study_page
from swap_hpc.study import table as study_report
from swap_hpc.study.plan import Plan, Trial
from swap_hpc.study.runner import run_trials
from swap_hpc.study.study import SHIPPED, load_study, shipped_studies

TINY = """
title = "tiny"
recipe = "digits"
ranks = 2
seeds = [0, 1, 2]
differences = [["after", "before"]]
[search]
seeds = [5]
set = ["data.validation=100"]
[runs.first]
set = ["refine.epochs=0"]
[runs.swap]
from = "first"
set = ["refine.learning_rate=[[0, {rate}], [4, 0.0]]"]
rates = [0.05, 0.1]
[[rows]]
method = "phase 1"
run = "first"
model = "large_batch"
[[rows]]
method = "before"
run = "swap"
model = "mean_of_groups"
[[rows]]
method = "after"
run = "swap"
"""


def plan(tmp_path: Path, text: str = TINY) -> Plan:
    (tmp_path / "tiny.toml").write_text(text)
    return Plan(load_study(str(tmp_path / "tiny.toml")), tmp_path / "out")


def complete(
    trial: Trial, averaged: float | None, groups: tuple[float, ...] = (), **seconds: float
) -> None:
    trial.folder.mkdir(parents=True)
    (trial.folder / "recipe.toml").write_text(trial.recipe.to_toml())
    result: dict[str, Any] = {
        "ranks": 1 if "--from" in trial.line else trial.ranks,
        "refine_ranks": trial.ranks,
        "epochs": {"large_batch": 7},
        "test_accuracy": {"large_batch": 0.5, "averaged": averaged, "mean_of_groups": None},
    }
    if groups:
        result["test_accuracy"]["mean_of_groups"] = sum(groups) / len(groups)
    result["seconds"] = {
        "large_batch": 100.0,
        "refine": 40.0,
        "average": 1.0,
        "batchnorm": 2.0,
        "evaluate": 1000.0,
        **seconds,
    }
    (trial.folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("name", shipped_studies())
def test_the_shipped_studies_can_run(name: str, tmp_path: Path) -> None:
    made = Plan(load_study(name), tmp_path, tmp_path)
    made.check()
    text = shipped_studies()[name].read_text()
    assert text.startswith("# ")
    for part in ("Source:", "Here:", f"swap-hpc study {name}"):
        assert part in text
    for trial in made.trials():
        assert trial.recipe.data.validation == 5000 and trial.recipe.seed not in made.study.seeds


def test_the_papers_rows_have_its_epochs_and_batches() -> None:
    def recipe(name: str, run: str) -> Any:
        return Plan(load_study(name), Path("out"))._trial(run, 0, 0.1, None)

    small, large, swap = (
        recipe("cifar10-table", run) for run in ("small-batch", "large-batch", "swap")
    )
    phase = small.recipe.large_batch
    assert (phase.batch_size, phase.epochs, small.ranks) == (512, 100, 1)
    phase = large.recipe.large_batch
    assert (phase.batch_size, phase.epochs, large.ranks) == (4096, 150, 8)
    phase = swap.recipe.refine
    assert (phase.batch_size, phase.epochs, swap.recipe.groups) == (512, 30, 8)
    two = recipe("cifar100-swa-table", "swap-2-20").recipe
    assert (two.groups, two.refine.cycles, two.refine.epochs) == (8, 2, 20)
    assert recipe("cifar100-swa-table", "large-batch-swa").recipe.refine.batch_size == 2048
    half = recipe("imagenet-table", "swap").recipe
    assert (half.groups, half.large_batch.epochs, half.refine.epochs) == (2, 22, 6)


def test_a_search_fills_the_peak_of_a_shape(tmp_path: Path) -> None:
    knots = '"refine.learning_rate=[[0, {rate}], [4, 0.0]]"'
    shape = """'refine.learning_rate={ shape = "cosine", peak = {rate}, warmup = "5%" }'"""
    made = plan(tmp_path, TINY.replace(knots, shape))
    made.check()
    peaks = {trial.rate: trial.recipe.refine.rate(0.2) for trial in made.trials() if trial.rate}
    assert peaks == {0.05: 0.05, 0.1: 0.1}


WRONG = [
    ("ranks = 2", "ranks = 3", "3 ranks"),
    ('run = "first"', 'run = "second"', "second: not among first, swap"),
    ('["after", "before"]', '["after", "never"]', "never: not among phase 1, before, after"),
    ("rates = [0.05, 0.1]", "", "runs.swap: rates and a {rate} in its set go together"),
    (
        '[search]\nseeds = [5]\nset = ["data.validation=100"]',
        "",
        r"runs.swap has several rates: a \[search\] with other seeds chooses one",
    ),
    ("seeds = [5]", "seeds = [2]", "search.seeds and seeds must not share a seed"),
    ('from = "first"', 'from = "later"', "later: not among first, swap"),
    ("refine.epochs=0", "refine.epoch=0", "unknown field refine.epoch"),
    ('set = ["data.validation=100"]', "", "the search would choose rates on test samples"),
    (
        'set = ["refine.epochs=0"]',
        'set = ["large_batch.epochs={rate}"]\nrates = [2]',
        "swap begins with phase 1 of first, which must have neither rates nor from",
    ),
    (
        'from = "first"',
        'from = "swap"',
        "swap begins with phase 1 of swap, which must be listed before it",
    ),
    ("title", "titel", "unknown field titel; valid here: title, recipe, ranks"),
    (
        'model = "large_batch"',
        'model = "best"',
        'needs "large_batch", "large_batch_ema", "mean_of_groups" or "averaged"',
    ),
    ('title = "tiny"', "title = tiny", "is not TOML"),
]


@pytest.mark.parametrize(
    ("old", "new", "message"), WRONG, ids=[new[:24] or old[:24] for old, new, _ in WRONG]
)
def test_a_wrong_study_is_refused_before_anything_runs(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert TINY.count(old) >= 1
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as error:
        plan(tmp_path, TINY.replace(old, new, 1)).check()
    assert "\n" not in str(error.value)


def test_the_best_rate_on_the_validation_samples_is_reported(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert [(trial.name, trial.rate, trial.recipe.seed) for trial in made.trials()] == [
        ("first", None, 5),
        ("swap", 0.05, 5),
        ("swap", 0.1, 5),
    ]
    with pytest.raises(RunError, match="this trial of the search has not ended"):
        made.rate("swap")
    for trial, accuracy in zip(made.trials(), (None, 0.7, 0.9), strict=True):
        complete(trial, accuracy, (0.5,) if accuracy else ())
    assert made.rate("swap") == 0.1
    reported = made.reported()
    assert [(trial.name, trial.recipe.seed) for trial in reported] == [
        (name, seed) for seed in (0, 1, 2) for name in ("first", "swap")
    ]
    swap = reported[1]
    assert swap.recipe.refine.rate(0) == 0.1 and swap.recipe.data.validation == 0
    assert swap.line[-2:] == ("--from", str(reported[0].folder))


def test_the_table_holds_what_the_runs_gave(tmp_path: Path) -> None:
    made = plan(tmp_path)
    for trial, accuracy in zip(made.trials(), (None, 0.7, 0.9), strict=True):
        complete(trial, accuracy, (0.5,) if accuracy else ())
    for trial in made.reported():
        seed = trial.recipe.seed
        complete(trial, *((0.80 + seed / 100, (0.7, 0.8)) if trial.name == "swap" else (None,)))
    phase_1, before, after = numbers.lines(made)
    assert (phase_1.epochs, after.epochs) == ("7", "7 + 4")
    assert phase_1.values == {0: 0.5, 1: 0.5, 2: 0.5}
    assert phase_1.seconds[0] == phase_1.parallel_seconds[0] == 100
    assert before.values[1] == pytest.approx(0.75) and before.seconds[0] == 140
    assert after.values[2] == pytest.approx(0.82) and after.seconds[0] == 143
    # four groups on two ranks: two in turn, so that with a rank for each phase 2 takes half as long
    assert after.parallel_seconds[0] == 123
    (gap,) = numbers.differences(made, [phase_1, before, after])
    # Student's t with 2 degrees of freedom; the differences are 5, 6 and 7 points
    assert gap.points == pytest.approx(6)
    assert gap.half_width == pytest.approx(4.303 * 1 / 3**0.5, rel=1e-3)
    written = study_report.write(made)
    text = written.read_text()
    for cell in (
        "| after ",
        "81.00 ± 1.00",
        "| after - before | +6.00 ",
        "123 ± 0 (computed)",
        "0.05: 70.00, 0.1: **90.00**",
        "over 3 seeds",
    ):
        assert cell in text, text
    content = json.loads(written.with_suffix(".json").read_text())
    assert content["rates"] == {"first": None, "swap": 0.1}
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_of_equal_differences_has_no_width_and_warns_of_nothing() -> None:
    assert numbers._half_width([0.8, 0.9, 1.0], [0.7, 0.8, 0.9]) == pytest.approx(0, abs=1e-9)
    assert numbers._half_width([0.5, 0.5], [0.25, 0.25]) == 0
    assert numbers._half_width([0.5], [0.25]) is None


def test_differences_of_small_numbers_keep_their_digits() -> None:
    gap = numbers.Difference("a", "b", 0.0031, 0.0002, 3)
    small = study_report.spread([0.00081, 0.00079], study_report._form("error"))
    assert small == "0.0008 ± 1.41421e-05"
    assert "| +0.0031 " in (text := study_report._differences([gap], "error"))
    assert "+0.0029 to +0.0033" in text
    assert "| +0.31 " in study_report._differences([replace(gap, points=0.31)], "accuracy")


def test_a_trial_that_diverged_is_not_chosen_and_not_run_again(tmp_path: Path) -> None:
    made = plan(tmp_path)
    first, slow, fast = made.trials()
    complete(first, None)
    complete(slow, 0.6, (0.5,))
    fast.folder.mkdir(parents=True)
    (fast.folder / "diverged.json").write_text("{}")
    assert [trial.rate for trial in run_trials(made.trials(), "false", "search")] == [
        None,
        0.05,
        0.1,
    ]
    assert made.rate("swap") == 0.05 and "0.1: diverged" in study_report.text(made)
    (slow.folder / "result.json").rename(slow.folder / "diverged.json")
    with pytest.raises(UserError, match="swap: every rate of the search diverged"):
        made.rate("swap")
    (slow.folder / "diverged.json").rename(slow.folder / "result.json")
    with pytest.raises(RunError, match=r"the study ends at .*first/seed-0 \(exit code 1"):
        list(run_trials(made.reported(), "false", "run"))


def test_a_run_on_other_ranks_is_not_taken_for_complete(tmp_path: Path) -> None:
    made = plan(tmp_path)
    complete(made.trials()[1], 0.5, (0.5,))
    result = json.loads((made.trials()[1].folder / "result.json").read_text())
    (made.trials()[1].folder / "result.json").write_text(json.dumps(result | {"refine_ranks": 4}))
    with pytest.raises(UserError, match="holds a run on 4 ranks, not 2"):
        _ = made.trials()[1].result


def test_a_first_phase_on_other_ranks_is_not_taken_for_complete(tmp_path: Path) -> None:
    first = plan(tmp_path).trials()[0]
    complete(first, None)
    assert first.result
    result = json.loads((first.folder / "result.json").read_text())
    (first.folder / "result.json").write_text(
        json.dumps(result | {"ranks": 1, "refine_ranks": None})
    )
    with pytest.raises(UserError, match="holds a run on 1 rank, not 2"):
        _ = first.result


def test_a_launcher_that_hides_an_end_ends_the_study(tmp_path: Path) -> None:
    message = r"the study ends at .*first/.*, which ended without a result: start it again to go on"
    with pytest.raises(RunError, match=message):
        list(run_trials(plan(tmp_path).trials(), "true", "search"))


def test_a_row_of_a_model_that_its_run_does_not_make_is_refused(tmp_path: Path) -> None:
    made = plan(tmp_path, TINY.replace('model = "large_batch"', ""))
    message = 'the row "phase 1" shows the averaged model of first, which has no refinement: write'
    with pytest.raises(UserError, match=message):
        made.check()


def test_a_row_of_a_moving_average_needs_one(tmp_path: Path) -> None:
    table = TINY.replace('model = "large_batch"', 'model = "large_batch_ema"')
    message = 'the row "phase 1" shows the moving average of phase 1 of first, which has none: set'
    with pytest.raises(UserError, match=message):
        plan(tmp_path, table).check()
    Plan(plan(tmp_path, table).study, tmp_path, overrides=("large_batch.ema=0.9",)).check()


def test_a_folder_of_another_recipe_is_not_taken_for_complete(tmp_path: Path) -> None:
    made = plan(tmp_path)
    complete(made.trials()[0], None)
    other = Plan(made.study, made.out, overrides=("large_batch.epochs=3",))
    with pytest.raises(
        UserError,
        match=r"holds a run of another recipe \(large_batch.epochs differ\): choose another --out",
    ):
        _ = other.trials()[0].result


def test_an_empty_value_gives_a_field_of_a_study_its_default(tmp_path: Path) -> None:
    study = plan(tmp_path).study
    made = Plan(study, tmp_path, overrides=("evaluate.every=3", "evaluate.every="))
    assert made.trials()[0].recipe.evaluate.every == 1
    failed = made.trials()[0]
    failed.folder.mkdir(parents=True)
    other = failed.recipe.model_copy(update={"seed": 99})
    (failed.folder / "recipe.toml").write_text(other.to_toml())
    (failed.folder / "diverged.json").write_text("{}")
    assert failed.result is None and not failed.diverged  # another recipe's, which saved nothing


def test_the_page_of_studies_is_that_of_the_schema() -> None:
    page = (SHIPPED / "fields.md").read_text()
    assert page == study_page.page(), "swap-hpc study --page > swap_hpc/study/fields.md"
    described = [line for line in page.splitlines() if line.startswith("| `")]
    models = study_page.SECTIONS.values()
    assert len(described) == sum(len(model.model_fields) for model in models)
    assert all(line.split("|")[-2].strip() for line in described)
