"""Recipes: what is written is read back, and wrong input is named with a hint."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from swap_hpc.errors import UserError
from swap_hpc.recipe import page as recipe_page
from swap_hpc.recipe.loading import (
    SHIPPED,
    check_same_recipe,
    differing_fields,
    load_recipe,
    parse,
    recipe_of,
    shipped_recipes,
    tomllib,
)
from swap_hpc.run.checks import check_ranks
from swap_hpc.run.idle_fields import idle_fields
from swap_hpc.study.study import load_study


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_reads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    assert shipped_recipes()[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipes_schedules_cover_its_epochs(name: str) -> None:
    recipe = load_recipe(name)
    for phase in (recipe.large_batch, recipe.refine):
        knots = phase.learning_rate
        assert isinstance(knots, tuple) and knots[-1][0] == phase.epochs
    assert recipe.refine.rate(recipe.refine.epochs) == 0


def test_overrides_take_numbers_words_lists_and_a_builders_arguments() -> None:
    overrides = [
        "refine.epochs=3",
        "data.name=synthetic",
        "refine.learning_rate=[[0, 0.5], [3, 0.0]]",
        "model.width=4",
        "augment.flip=true",
    ]
    recipe = load_recipe("digits", overrides, data=Path("/elsewhere"))
    assert recipe.refine.epochs == 3
    assert recipe.data.name == "synthetic"
    assert recipe.refine.learning_rate == ((0, 0.5), (3, 0))
    assert recipe.model.arguments == {"width": 4}
    assert recipe.augment.flip is True
    assert recipe.data.path == Path("/elsewhere")


WRONG = [
    (
        {"data": {"name": "digits", "test_every": 5}},
        "data: test_every splits a folder of images: digits comes split",
    ),
    (
        {"data": {"path": "~nobody_here/images"}},
        r"data.path: needs a path whose home directory exists \(given: '~nobody_here",
    ),
    (
        {"refine": {"epoch": 3}},
        "unknown field refine.epoch; "
        "valid here: batch_size, epochs, learning_rate, accumulate, ema, cycles",
    ),
    ({"group": 3}, "unknown field group; valid here: name, seed, groups, precision"),
    ({"groups": 0}, r"groups: needs at least 1 \(given: 0\)"),
    ({"precision": "fp8"}, 'precision: needs "fp32", "bf16" or "fp16"'),
    (
        {"refine": {"learning_rate": [[3, 0.1], [1, 0.0]]}},
        "refine.learning_rate: needs .* ascending",
    ),
    (
        {"refine": {"learning_rate": [[0, -0.1]]}},
        r"refine.learning_rate \(item 2 of item 1\): needs at least 0 \(given: -0.1\)",
    ),
    ({"refine": {"learning_rate": []}}, "refine.learning_rate: needs at least one"),
    (
        {"data": {"image_size": [[1, 32]]}},
        r"data.image_size: needs \[epoch, pixels\] pairs .*, the first at epoch 0",
    ),
    ({"optimizer": {"momentum": 0.0}}, "optimizer: nesterov = true needs a momentum"),
    (
        {"refine": {"average_every_steps": 2, "cycles": 2}},
        "refine: average_every_steps needs one schedule to the end: set cycles = 1",
    ),
    ({"large_batch": {"epochs": 0}}, "name its file in model.weights"),
    ({"large_batch": {"epochs": 0}, "refine": {"epochs": 0}}, "nothing to train"),
    ({"augment": {"crop_area": [0.5, 0.1]}}, "augment.crop_area: needs two positive numbers"),
    ({"augment": {"crop_area": [0.5, 1.0]}}, "augment: crop_area and pad are two ways to take a"),
    ({"augment": {"crop_ratio": [1, 2]}}, "crop_ratio has no effect without crop_area: set crop"),
    ({"data": {"mean": [120, 110, 100]}}, "data.mean.*: needs a number from 0 to 1 for each"),
    ({"data": {"std": [0.2, 0.2, 0.0]}}, "data.std.*: needs numbers above 0"),
    (
        # two epochs together, one of each group
        {"data": {"image_size": [[0, 8], [2, 16], [3, 32]]}},
        "data.image_size has 32 pixels from epoch 3 on, but the run has 3 epochs, counted from 0",
    ),
]


def test_sizes_of_images_may_change_until_the_last_epoch() -> None:
    sizes = [[0, 8], [2, 16], [5, 32]]
    recipe = tiny.recipe(data={"image_size": sizes}, refine={"epochs": 2, "cycles": 2})
    assert recipe.data.last_size == 32 and recipe.unused_size is None
    # phase 1 alone, which others go on from: a run's first lines tell
    first = tiny.recipe(data={"image_size": sizes}, refine={"epochs": 0})
    told = (
        "32 pixels from epoch 5 on, but the run has 2 epochs, counted from 0: no image is trained"
    )
    assert told in str(first.unused_size)
    assert first.unused_size in idle_fields(first, tiny.model(tiny.job()))


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny.recipe(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[1].glob("runs/**/recipe.toml")), ids=str
)
def test_a_recorded_runs_recipe_says_what_the_run_did(file: Path) -> None:
    """Random crops were listed for images in memory, and not used."""
    recipe = load_recipe(str(file))
    assert (recipe.augment.pad, recipe.augment.crop_area) == (4, None)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(UserError, match="precision.*refine.epochs"):
        tiny.recipe(precision="fp8", refine={"epochs": "many"})


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    message = "no recipe 'digit': neither a file nor one of cifar10-cpu, cifar10, .*digits"
    with pytest.raises(UserError, match=message):
        load_recipe("digit")


@pytest.mark.parametrize(
    ("override", "message"),
    [("refine.epochs", "write it as"), ("seed.x=1", "seed is a field, not a section")],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("digits", ["seed=1", override])


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("groups = = 4")
    with pytest.raises(UserError, match="x.toml is not TOML"):
        load_recipe(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_recipes_are_utf8_as_editors_write_it(encoding: str, newline: str, tmp_path: Path) -> None:
    """A byte-order mark and the line ending make no difference."""
    text = "# Bäume\n" + tiny.recipe(data={"path": "ü ñ 日本", "name": "folder"}).to_toml()
    (tmp_path / "x.toml").write_bytes(text.replace("\n", newline).encode(encoding))
    assert load_recipe(str(tmp_path / "x.toml")) == parse(tomllib.loads(text))


@pytest.mark.parametrize(
    ("encoding", "byte"),
    [("latin-1", "0xe4 in line 2"), ("cp1252", "0xe4 in line 2"), ("utf-16", "0xff in line 1")],
)
@pytest.mark.parametrize("load", [load_recipe, load_study])
def test_another_encoding_is_named(
    load: Callable[[str], Any], encoding: str, byte: str, tmp_path: Path
) -> None:
    (tmp_path / "x.toml").write_text("seed = 1\n# Bäume\n", encoding=encoding)
    message = rf"x.toml is not UTF-8, as TOML has to be \(byte {byte}\): save it as UTF-8$"
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "x.toml"))


NAMES = [
    "it's data",
    'so "called"',
    "a # b",
    "a\\b",
    ' """',
    "a = b",
    "[x]",
    "{y}",
    "2024",
    "true",
    "ü ñ",
    "two\nlines",
    " x ",
    "$HOME",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    """The name is taken as given, and survives being written into a run's folder."""
    recipe = load_recipe("digits", data=tmp_path / name)
    assert recipe.data.path == tmp_path / name

    text = recipe.to_toml()
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8", newline="\n")
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    assert recipe_of(text, "recipe.toml") == recipe

    assert load_recipe("digits", data=Path(name)).data.path == Path(name)
    assert recipe_of(text, "x", Path(name)).data.path == Path(name)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    shutil.copy(shipped_recipes()["digits"], tmp_path / f"{latin}.toml")
    text = load_recipe("digits").to_toml()
    message = "caf\udce9 is not UTF-8, as recipes are: rename it, or use a link to it$"
    for wrong in (
        lambda: load_recipe("digits", data=Path(latin)),
        lambda: recipe_of(text, "x", Path(latin)),
        lambda: load_recipe("digits", [f"data.path={latin}"]),
        lambda: load_recipe(str(tmp_path / f"{latin}.toml")),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


IN_ANOTHER_LOCALE = """
import os, sys
from swap_hpc.recipe.loading import load_recipe, recipe_of
recipe = load_recipe(sys.argv[1], [sys.argv[2]])
assert recipe_of(recipe.to_toml(), "x") == recipe and recipe.name == "B" + chr(228) + "ume"
print(ascii(recipe.to_toml().encode()), os.listdir(recipe.data.path), sys.getfilesystemencoding())
"""


def test_a_recipe_means_the_same_files_in_any_locale(tmp_path: Path) -> None:
    """Text is UTF-8 and a file name is its bytes, even in a locale without UTF-8."""
    (tmp_path / "ü ñ 日本" / "train").mkdir(parents=True)
    text = tiny.recipe(data={"path": "ü ñ 日本", "name": "folder"}).to_toml()
    (tmp_path / "ü.toml").write_text(text, encoding="utf-8")
    line = [sys.executable, "-c", IN_ANOTHER_LOCALE, "ü.toml", "name=Bäume"]

    def run(**variables: str) -> list[str]:
        """Return what the program printed: recipe and files, and the file system's encoding."""
        environment = dict(os.environ) | variables
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode().rsplit(maxsplit=1)

    content, encoding = run(PYTHONUTF8="1")
    plain_content, plain_encoding = run(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert content == plain_content
    assert (encoding, plain_encoding) == ("utf-8", "ascii")


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_recipe("digits", ["data.path=~/images"]).data.path == Path("/home/someone/images")


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny.recipe().seed = 1


def test_differing_fields_leave_out_where_the_data_lie() -> None:
    one = load_recipe("digits", data=Path("/a"))
    moved = load_recipe("digits", data=Path("/b"))
    other = load_recipe("digits", ["seed=9", "model.width=4"])
    assert differing_fields(one, moved) == []
    assert differing_fields(one, other) == ["model.width", "seed"]


def test_a_run_of_another_recipe_is_refused_with_the_fields() -> None:
    recipe = load_recipe("digits")
    other = load_recipe("digits", ["seed=9", "model.width=4"])
    with pytest.raises(UserError) as error:
        check_same_recipe(recipe, other, "runs/x holds a run of", "the folder")
    assert str(error.value) == (
        "runs/x holds a run of another recipe (model.width, seed differ): "
        "choose another --out, or remove the folder"
    )


def test_a_run_may_go_on_with_other_saves_and_with_its_data_elsewhere() -> None:
    recipe = load_recipe("digits")
    changed = ["checkpoint.minutes=1", "watchdog.minutes=1", "tensorboard=true"]
    moved = load_recipe("digits", changed, data=Path("/elsewhere"))
    check_same_recipe(recipe, moved, "runs/x holds a run of", "the folder")


GRIDS = [
    (1, 4, True),
    (2, 4, True),
    (3, 4, False),
    (4, 4, True),
    (6, 4, False),
    (8, 4, True),
    (16, 2, True),
]


@pytest.mark.parametrize(("ranks", "groups", "fits"), GRIDS)
def test_ranks_are_a_multiple_or_a_divisor_of_the_groups(
    ranks: int, groups: int, fits: bool
) -> None:
    recipe = tiny.recipe(groups=groups, large_batch={"batch_size": 48}, refine={"batch_size": 16})
    if fits:
        check_ranks(recipe, ranks)
        return
    with pytest.raises(UserError, match="start a multiple or a divisor"):
        check_ranks(recipe, ranks)


def test_batches_must_divide_by_their_ranks() -> None:
    with pytest.raises(
        UserError,
        match=r"large_batch.batch_size = 24 does not divide by its 5 ranks: "
        r"--set large_batch.batch_size=20 or 25",
    ):
        check_ranks(tiny.recipe(), 5)
    with pytest.raises(UserError, match=r"refine.batch_size = 12 does not divide by its 8 ranks"):
        check_ranks(tiny.recipe(), 8)
    check_ranks(tiny.recipe(groups=8), 8)  # each group is one rank: 12 divides by 1


def test_another_share_per_rank_is_refused_where_the_recipe_states_it() -> None:
    recipe = tiny.recipe(large_batch={"batchnorm_batch_size": 12})
    check_ranks(recipe, 2)
    with pytest.raises(UserError, match="4 ranks share batches of 24 as 6 each: start 2 ranks"):
        check_ranks(recipe, 4)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match="model is missing"):
        parse({"data": {"name": "digits"}})


@pytest.mark.parametrize(
    ("seconds", "saves"),
    [
        pytest.param(10.0, 10, id="every epoch"),
        pytest.param(5.0, 5, id="every other epoch, since min_seconds is 10"),
        pytest.param(0.0, 10, id="epochs of unknown length"),
    ],
)
def test_saves_are_counted_from_the_length_of_an_epoch(seconds: float, saves: int) -> None:
    checkpoint = tiny.recipe(checkpoint={"min_seconds": 10}).checkpoint
    assert checkpoint.saves(10, seconds) == saves


def test_the_page_of_recipes_is_that_of_the_schema() -> None:
    page = (SHIPPED / "README.md").read_text()
    assert page == recipe_page.page(), "swap-hpc recipes --page > swap_hpc/recipe/README.md"
    described = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(described) > 40
    assert all(line.split("|")[-2].strip() for line in described)


def test_an_empty_value_gives_a_field_its_default() -> None:
    changed = load_recipe("digits", ["refine.evaluate_average=3", "model.width=", "name="])
    assert changed.refine.evaluate_average == 3
    assert "width" not in changed.model.arguments and changed.name == "digits"
    unset = load_recipe("digits", ["refine.evaluate_average=3", "refine.evaluate_average="])
    assert unset.refine.evaluate_average == 0
    whole = load_recipe("digits", ["large_batch.stop_accuracy="])
    assert whole.large_batch.stop_accuracy is None
    assert load_recipe("digits", ["evaluate.every="]).evaluate.every == 1
    for override, message in (
        ("refine.epochs=", "--set refine.epochs=: the field has no default: give it a value"),
        ("refine.epoch=", "--set refine.epoch=: there is no such field to give its default to"),
        ("model.name.r=", "--set model.name.r=: name is a field, not a section"),
        ("refined.epochs=", "--set refined.epochs=: there is no such field"),
        ("data.arguments.colour=", "--set data.arguments.colour=: there is no such field"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_recipe("digits", [override])


def test_a_field_of_one_form_of_a_section_can_be_unset(tmp_path: Path) -> None:
    text = (SHIPPED / "digits.toml").read_text()
    knots = "learning_rate = [[0, 0.1], [4, 0.0]]"
    assert knots in text
    file, unset = tmp_path / "cosine.toml", ["refine.learning_rate.warmup="]
    for given in ("", ", warmup = 2"):
        cosine = f'learning_rate = {{ shape = "cosine", peak = 0.1{given} }}'
        file.write_text(text.replace(knots, cosine))
        rates = load_recipe(str(file), unset).refine.learning_rate
        assert rates == parse_rates(text.replace(knots, cosine.replace(given, "")), tmp_path)
    for override, message in (
        ("refine.learning_rate.warm=", "there is no such field to give its default to"),
        ("refine.learning_rate.peak=", "the field has no default: give it a value"),
    ):
        with pytest.raises(UserError, match=f"{override}: {message}"):
            load_recipe(str(file), [override])


def parse_rates(text: str, folder: Path) -> Any:
    (folder / "plain.toml").write_text(text)
    return load_recipe(str(folder / "plain.toml")).refine.learning_rate


def test_metrics_are_set_in_a_recipe_with_the_one_metric_of_earlier_versions(
    tmp_path: Path,
) -> None:
    text = 'metric = "top5"\n' + (SHIPPED / "digits.toml").read_text()
    (tmp_path / "earlier.toml").write_text(text)
    for override, names in (
        ([], ["top5"]),
        (["metric=class_accuracy"], ["class_accuracy"]),
        (["metrics="], ["accuracy"]),
        (['metrics=["accuracy", "top5"]'], ["accuracy", "top5"]),
    ):
        read = load_recipe(str(tmp_path / "earlier.toml"), override)
        assert read.metric_names == names
        assert recipe_of(text, "x", overrides=override).metric_names == names
    with pytest.raises(UserError, match="metric and metrics exclude each other"):
        load_recipe("digits", ["metrics=top5", "metric=top5"])


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        ("refine.epochs", "--extend refine.epochs: write it as --extend section.field=value"),
        ("refine.epochs=", "--extend refine.epochs=: the field has no default: give it a value"),
        ("model.name.r=1", "--extend model.name.r=1: name is a field, not a section"),
    ],
)
def test_what_is_wrong_with_an_extension_names_its_option(extension: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_recipe("digits", ["refine.epochs=3"], None, [extension])


def test_a_field_below_a_list_of_sections_cannot_be_unset(tmp_path: Path) -> None:
    text = (SHIPPED / "digits.toml").read_text()
    file = tmp_path / "grouped.toml"
    file.write_text(f'{text}\n[[optimizer.groups]]\nmatch = "*.bias"\nfrozen = true\n')
    message = "--set optimizer.groups.frozen=: groups is a field, not a section"
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(str(file), ["optimizer.groups.frozen="])


def test_one_pattern_needs_no_list() -> None:
    fields = ("model.weights=w.pth", "model.weights_except=head.*")
    assert load_recipe("digits", fields).model.weights_except == ("head.*",)
