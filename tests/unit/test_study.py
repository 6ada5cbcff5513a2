"""Studies: the shipped ones, what a file may say, and the table that is made of results."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from swap_hpc.errors import RunError, UserError
from swap_hpc.recipe.loading import differing_fields, load_recipe
from swap_hpc.study import networks, numbers
from swap_hpc.study import page as study_page
from swap_hpc.study import table as study_report
from swap_hpc.study.plan import Plan, Which
from swap_hpc.study.runner import run_trials
from swap_hpc.study.study import SHIPPED, check_seeds, load_study, shipped_studies
from swap_hpc.study.trial import Network, Trial

RUNS = Path(__file__).parents[1] / "runs"

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
    trial.folder.mkdir(parents=True, exist_ok=True)
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


def test_the_header_of_the_study_of_hosts_starts_its_own_run() -> None:
    """On one host, while others are busy, which `swap-hpc study` does not start."""
    header = (SHIPPED / "cifar10-hosts.toml").read_text(encoding="utf-8").partition("title")[0]
    words = shlex.split(header.partition("--each swap-hpc train cifar10-cpu")[2].replace("#", ""))
    given = [after for word, after in pairwise(words) if word == "--set"]
    by_hand = load_recipe("cifar10-cpu", [field.replace("{host}", "0") for field in given])
    made = Plan(load_study("cifar10-hosts"), RUNS / "cifar10-hosts")
    assert differing_fields(by_hand, made.reported_recipe("one-host")) == []


def test_the_papers_rows_have_its_epochs_and_batches() -> None:
    def recipe(name: str, run: str) -> Any:
        return Plan(load_study(name), Path("out"))._trial(Which(run, 0, 0.1))

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
    ('title = "tiny"', 'title = "tiny"\ntimed_seeds = [0, 7]', "timed_seeds must be among seeds"),
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
    (
        'from = "first"\nset = [',
        'from = "first"\nset = ["large_batch.epochs=3", ',
        "swap begins with phase 1 of first, but large_batch.epochs differ: put them into the first",
    ),
    (
        "rates = [0.05, 0.1]",
        'rates = [0.05, 0.1]\nsearch_set = ["large_batch.epochs=3"]',
        "large_batch.epochs differ in the search: put them into search.set",
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
    written, *_ = study_report.write(made)
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


NETWORKS = """
networks = { fast = 1000, slow = 10 }
timed_epochs = 3
differences = [["after", "phase 1"]]
"""


def times(trial: Trial, **epochs: list[float]) -> None:
    """Write the lines of epochs that took so many seconds, by the names of their files."""
    (trial.folder / "metrics").mkdir()
    for name, seconds in epochs.items():
        phase, group = ("large_batch", None) if name == "world" else ("refine", int(name[-1]))
        lines = [{"phase": phase, "group": group, "train_seconds": each} for each in seconds]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (trial.folder / "metrics" / f"{name}.jsonl").write_text(text)


def test_networks_are_compared_by_a_few_epochs(tmp_path: Path) -> None:
    text = TINY.replace('differences = [["after", "before"]]', NETWORKS)
    made = replace(plan(tmp_path, text), networks=("fast", "slow"))
    made.check()
    for trial, accuracy in zip(made.trials(), (None, 0.7, 0.9), strict=True):
        complete(trial, accuracy, (0.5,) if accuracy else ())
    for trial in made.reported():
        assert trial.network and trial.network.name == "fast"
        trial.record_network()
        complete(trial, *((0.8, (0.7, 0.8)) if trial.name == "swap" else (None,)))
    first, swap = made.timed()
    assert {first.network, swap.network} == {Network("slow", 10)}
    assert (first.recipe.large_batch.epochs, first.recipe.refine.epochs) == (3, 0)
    assert (swap.recipe.large_batch.epochs, swap.recipe.refine.epochs) == (3, 3)
    assert str(first.folder) in swap.line  # whose phase 1 it begins with
    first.record_network()
    swap.record_network()
    complete(first, None)
    times(first, world=[99.0, 20.0, 22.0])
    complete(swap, 0.8, (0.7, 0.8), average=3.0)
    times(swap, world=[99.0, 20.0, 22.0], group0=[9.0, 1.0, 1.0], group1=[9.0, 2.0, 2.0])
    over = networks.timings(made, numbers.lines(made))
    assert over["phase 1"]["fast"] == networks.Timing(100.0, 0.0, complete=True)
    epochs = 7  # that the complete runs took, of the 20 that are allowed
    slow = over["phase 1"]["slow"]
    assert (slow.seconds, slow.complete) == (pytest.approx(21 * epochs), False)
    assert slow.error == pytest.approx(1 / 21)  # of a mean of 20 and 22
    # two groups in turn on each rank, four epochs at the slower group's 2 seconds
    assert over["after"]["slow"].seconds == pytest.approx(21 * epochs + 2 * 4 * 2 + 3 + 2)
    written = study_report.write(made)
    assert [file.name for file in written][-1] == "networks.png" and written[-1].is_file()
    assert f"| *{21 * epochs:,} (± 4.8 %)*" in written[0].read_text()
    # A call whose launcher takes no network tells what the others found.
    assert study_report.write(replace(made, networks=())) == written
    # Seeds that are not timed may need other numbers of epochs.
    untimed = made.reported([2])[0].folder / "result.json"
    result = json.loads(untimed.read_text(encoding="utf-8"))
    untimed.write_text(json.dumps(result | {"epochs": {"large_batch": 70}}), encoding="utf-8")
    chosen = replace(made, study=made.study.model_copy(update={"timed_seeds": (0, 1)}))
    over = networks.timings(chosen, numbers.lines(chosen))
    assert over["phase 1"]["slow"].seconds == pytest.approx(21 * epochs)

    other_rate = made.study.model_copy(update={"networks": {"fast": 1000, "slow": 20}})
    with pytest.raises(UserError, match=r"over slow \(10 Mbit/s\), not over slow \(20 Mbit/s\)"):
        _ = replace(made, study=other_rate).timed()[0].result
    # What began over a network does not go on over an unknown one.
    (swap.folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="was begun over slow: let it go on over that network"):
        replace(swap, network=None).record_network()
    (swap.folder / "checkpoints").rmdir()
    (swap.folder / "network.json").unlink()
    with pytest.raises(UserError, match="holds a run over one network, not over slow"):
        _ = swap.result


def test_seeds_that_are_not_timed_show_metrics_only(tmp_path: Path) -> None:
    text = TINY.replace('differences = [["after", "before"]]', NETWORKS)
    text = text.replace("seeds = [0, 1, 2]", "seeds = [0, 1, 2]\ntimed_seeds = [1]")
    text = text.replace("rates = [0.05, 0.1]", "rates = [0.05]")
    made = replace(plan(tmp_path, text), networks=("fast", "slow"))
    for trial in made.reported():
        if trial.recipe.seed == 1:
            trial.record_network()
        complete(trial, *((0.8, (0.7, 0.8)) if trial.name == "swap" else (None,)))
    (_, _, after) = numbers.lines(made)  # which takes runs of any network where nothing is timed
    assert sorted(after.values) == [0, 1, 2] and after.seconds == {1: 143.0}
    assert {trial.recipe.seed for trial in made.timed()} == {1}
    assert "over 3 seeds. Seconds are those of seed 1." in study_report.text(made)
    plain = replace(made, networks=())  # a launcher without {network}
    for shown in (made, plain):
        assert all(file.is_file() for file in study_report.write(shown))
    (made.reported([1])[0].folder / "result.json").unlink()  # a row without seconds
    assert len(study_report.write(plain)) == 3
    # a part of the seeds
    assert {trial.recipe.seed for trial in made.reported([2, 0])} == {0, 2}
    assert made.timed([2, 0]) == [] and made.timed([1]) == made.timed()
    with pytest.raises(UserError, match="--seed 7: the study's seeds are 0, 1, 2"):
        check_seeds(made.study, [2, 7])


def test_sync_points_count_in_each_epoch(tmp_path: Path) -> None:
    text = TINY.replace('differences = [["after", "before"]]', NETWORKS)
    text = text.replace("rates = [0.05, 0.1]", "rates = [0.05]")
    text = text.replace(
        'set = ["refine.learning', 'set = ["refine.average_every_steps=2", "refine.learning'
    )
    made = replace(plan(tmp_path, text), networks=("fast", "slow"))
    first, swap = made.timed()
    for trial in (first, swap):
        trial.record_network()
        complete(trial, 0.8 if trial is swap else None, (0.7,), average=6.0)
        times(trial, world=[99.0, 20.0, 20.0], group0=[9.0, 1.0, 1.0])
    after = networks.timings(made, numbers.lines(made))["after"]["slow"]
    # 3 of 4 epochs were timed: 40 seconds of refinement with its waits, and 6 of averages
    assert after.seconds == pytest.approx(20 * 20 + (40 + 6) * 4 / 3 + 2)


@pytest.mark.parametrize(
    "change",
    [
        ('from = "first"', 'from = "first"\nranks = 4'),
        ('title = "tiny"', 'title = "tiny"\nset = ["refine.evaluate_average=4"]'),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_runs(
    change: tuple[str, str], tmp_path: Path
) -> None:
    text = TINY.replace('differences = [["after", "before"]]', NETWORKS).replace(*change)
    made = replace(plan(tmp_path, text), networks=("fast", "slow"))
    if "ranks" not in change[1]:
        made.check()  # the average is evaluated at the end of what is timed
        return
    with pytest.raises(UserError, match="on another number of ranks: give both the same"):
        made.check()


def test_rows_cross_where_their_seconds_are_equal() -> None:
    # a row takes 1 second and 100 / rate, the other one 2 seconds and 10 / rate: equal at 90
    points = [(1 / rate, 100 / rate + 1 - (2 + 10 / rate)) for rate in (1000, 10)]
    (found,) = networks._crossings("one", "other", points)
    assert found.megabits == pytest.approx(90) and found.faster_below == "other"
    (never,) = networks._crossings("one", "other", [(0.1, 1.0), (0.2, 2.0)])
    assert never == networks.Crossing("one", "other", None, "other")
    both = [*networks._crossings("one", "other", [(0.01, 5.0), (0.1, -1.0), (1.0, 3.0)])]
    assert [each.faster_below for each in both] == ["one", "other"]


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
