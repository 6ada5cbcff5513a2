"""Data, losses and metrics of one's own: what they may return, and what is said where they do not."""

import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from swap_hpc.data import Batches, Dataset, load
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import parse
from swap_hpc.run.prepare import prepare
from swap_hpc.train.job import Job
from swap_hpc.train.objective import as_float32

IMAGES, LABELS = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_parts")
    monkeypatch.setitem(sys.modules, "own_parts", module)
    return module


def loaded(returns: Any, own: ModuleType, **arguments: Any) -> Dataset:
    own.load = lambda path, size=8: returns  # type: ignore[attr-defined]
    return load(
        tiny.recipe(data={"name": "own_parts:load", "arguments": arguments}).data, Team.alone(), 1
    )


def test_arrays_become_a_data_set(own: ModuleType) -> None:
    dataset = loaded(((IMAGES, LABELS.astype(np.int32)), (IMAGES[:2], [0, 3])), own, size=8)
    assert len(dataset.classes) == 4 and dataset.channels == 3 and dataset.image_size == (8, 8)
    assert dataset.train.labels.dtype == np.int64  # type: ignore[union-attr]


WRONG = [
    (
        None,
        "returned a NoneType: a Dataset, or ((images, labels), (test images, test labels)), is needed",
    ),
    (
        ((IMAGES[0], LABELS), (IMAGES, LABELS)),
        "returned images [8, 8, 3] uint8: they must be (N, H, W, C) uint8",
    ),
    (
        ((IMAGES.transpose(0, 3, 1, 2), LABELS), (IMAGES, LABELS)),
        "returned images [6, 3, 8, 8], which look like (N, C, H, W)",
    ),
    (
        ((IMAGES / 255, LABELS), (IMAGES, LABELS)),
        "returned images [6, 8, 8, 3] float64: they must be (N, H, W, C) uint8",
    ),
    (
        ((IMAGES, LABELS[:5]), (IMAGES, LABELS)),
        "returned labels [5] int64: they must be (N,) integers from 0",
    ),
    (((IMAGES, LABELS - 1), (IMAGES, LABELS)), "they must be (N,) integers from 0"),
    (
        ((IMAGES, LABELS), (IMAGES[:, :4], LABELS)),
        "returned training images of [8, 8, 3] and test images of [4, 8, 3]: they must have",
    ),
]


@pytest.mark.parametrize(("returns", "message"), WRONG)
def test_what_is_no_data_set_is_named(returns: Any, message: str, own: ModuleType) -> None:
    with pytest.raises(UserError) as raised:
        loaded(returns, own)
    assert message in str(raised.value)


def test_wrong_arguments_and_missing_modules_are_named(own: ModuleType) -> None:
    with pytest.raises(
        UserError,
        match="cannot be called with data.path and data.arguments: got an unexpected keyword",
    ):
        loaded(None, own, colour=3)
    with pytest.raises(
        UserError,
        match=r"the data nowhere:load cannot be imported \(No module named 'nowhere'\): is it in this folder",
    ):
        load(tiny.recipe(data={"name": "nowhere:load"}).data, Team.alone(), 1)
    with pytest.raises(UserError, match="the loss own_parts:mse: own_parts has no mse; it has "):
        _ = tiny.job(loss="own_parts:mse").objective
    own.number = 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="the loss own_parts:number is a int: a function is needed"):
        _ = tiny.job(loss="own_parts:number").objective
    with pytest.raises(UserError, match='the model :build: write it as "package.module:function"'):
        tiny.model(tiny.job(model={"name": ":build"}))


def test_a_module_that_fails_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import numpy\nimport a_library_that_nobody_has\n")
    (tmp_path / "fails_here.py").write_text("import numpy\n\nnumpy.zeros(-1)\n")
    (tmp_path / "not_python.py").write_text("def build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        (
            "needs_more",
            r"ModuleNotFoundError: No module named 'a_library_that_nobody_has' \(needs_more.py, line 2\)$",
        ),
        (
            "fails_here",
            r"ValueError: negative dimensions are not allowed \(fails_here.py, line 3\)$",
        ),
        ("not_python", r"SyntaxError: .*\(not_python.py, line 1\)$"),
    ):
        with pytest.raises(UserError, match=f"the data {name}:load cannot be imported: {message}"):
            load(tiny.recipe(data={"name": f"{name}:load"}).data, Team.alone(), 1)


def test_names_are_checked_where_the_recipe_is_read() -> None:
    fields = tiny.recipe().model_dump(mode="json", exclude_none=True)
    for wrong, message in (
        (
            {"data": {"name": "digit"}},
            "data.name: needs digits, cifar10, .* or \"package.module:function\" .given: 'digit'.",
        ),
        ({"loss": "mse"}, 'loss: needs cross_entropy or "package.module:function"'),
        ({"loss": "a:b", "label_smoothing": 0.1}, "label_smoothing is of cross_entropy"),
    ):
        with pytest.raises(UserError, match=message):
            parse(fields | wrong)


def test_a_split_of_ones_own_is_cut_by_its_own_numbers() -> None:
    seen: list[list[int]] = []

    def function(picks: Any, training: bool) -> Any:
        for pick in picks:
            seen.append(pick.indices.tolist())
            yield torch.zeros(len(pick.indices), 2), torch.zeros(len(pick.indices))

    half = Batches(10, function).take(np.array([1, 3, 5, 7])).take(np.array([3, 0]))
    assert len(half) == 2
    list(half.read(iter([Picks(np.array([0, 1]), None)]), training=True))
    assert seen == [[7, 1]]


def test_a_loss_and_a_score_of_ones_own_are_used(own: ModuleType) -> None:
    own.loss = lambda outputs, targets: F.mse_loss(outputs[:, 0], targets.float())  # type: ignore[attr-defined]
    own.near = lambda outputs, targets: 1 / (1 + (outputs[:, 0] - targets).abs())  # type: ignore[attr-defined]
    objective = tiny.job(loss="own_parts:loss", metric="own_parts:near").objective
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1])
    assert objective.loss(outputs, targets) == 2 and objective.total_loss(outputs, targets) == 4
    assert objective.score(outputs, targets).tolist() == pytest.approx([1, 1 / 3])


def test_a_loss_or_a_score_of_another_shape_is_named(own: ModuleType) -> None:
    outputs, targets = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    own.each = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")  # type: ignore[attr-defined]
    own.mean = lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()  # type: ignore[attr-defined]
    own.number = lambda outputs, targets: 0.5  # type: ignore[attr-defined]
    with pytest.raises(
        UserError,
        match=r"the loss own_parts:each returned a tensor \[4\] float32: the batch's mean",
    ):
        tiny.job(loss="own_parts:each").objective.loss(outputs, targets)
    with pytest.raises(
        UserError, match="the loss own_parts:number returned a float: the batch's mean"
    ):
        tiny.job(loss="own_parts:number").objective.total_loss(outputs, targets)
    with pytest.raises(
        UserError,
        match=r"the metric own_parts:mean returned a tensor \[\] float32: .* a tensor \[4\], is needed",
    ):
        tiny.job(metric="own_parts:mean").objective.score(outputs, targets)


def test_own_batches_may_be_a_list_and_have_to_be_those_asked_for() -> None:
    """An evaluation hands over its picks once; a pair too few or of another size is named instead of counted."""
    inputs, targets = torch.randn(9, 3, 4, 4), torch.arange(9) % 3

    def evaluated(function: Any) -> int:
        split = Batches(9, function)
        job = Job(
            tiny.recipe(evaluate={"batch_size": 4}), Dataset(split, split, tuple("abc")), tiny.CPU
        )
        return [sum(len(found) for _, found in job.test_batches(Team.alone())) for _ in range(2)][1]

    assert (
        evaluated(
            lambda picks, training: [
                (inputs[pick.indices], targets[pick.indices]) for pick in picks
            ]
        )
        == 9
    )
    with pytest.raises(UserError, match="makes test batches ended early"):
        evaluated(
            lambda picks, training: [
                (inputs[pick.indices], targets[pick.indices]) for pick in [next(picks)]
            ]
        )
    with pytest.raises(UserError, match="returned 9 targets for 4 picked samples"):
        evaluated(lambda picks, training: ((inputs, targets) for _ in picks))


def test_a_data_set_of_arrays_is_completed(own: ModuleType) -> None:
    bare = Dataset(
        Arrays(IMAGES, LABELS.astype(np.int64)),
        Arrays(IMAGES, LABELS.astype(np.int64)),
        ("a", "b", "c"),
    )
    found = loaded(bare, own)
    assert (
        found.image_size == (8, 8)
        and found.channels == 3
        and len(found.mean) == len(found.std) == 3
    )
    assert loaded(replace(bare, mean=(1.0, 2.0, 3.0)), own).mean == (1.0, 2.0, 3.0)
    with pytest.raises(UserError, match="returned a Dataset without samples"):
        loaded(replace(bare, test=Arrays(IMAGES[:0], LABELS[:0])), own)


def test_outputs_of_any_shape_leave_autocast_as_float32() -> None:
    low, whole = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    found = as_float32({"a": low, "b": (low, [whole, None])})
    pair = namedtuple("pair", "logits aux")
    assert as_float32(pair(low, whole)).logits.dtype == torch.float32
    assert (
        found["a"].dtype == found["b"][0].dtype == torch.float32
        and found["b"][1][0] is whole
        and found["b"][1][1] is None
    )


def test_modules_of_the_folder_that_a_job_starts_in_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here_it_is.py").write_text("def load(path):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match="returned a NoneType"):
        load(tiny.recipe(data={"name": "here_it_is:load"}).data, Team.alone(), 1)


def test_batch_norms_sizes_matter_to_models_that_have_it() -> None:
    def prepared(model: str) -> None:
        recipe = tiny.recipe(
            model={"name": model},
            data={"samples": 100},
            batchnorm={"batch_size": 200, "samples": 200},
        )
        prepare(recipe, Team.alone(), Team.alone())

    prepared("tiny:plain")
    with pytest.raises(
        UserError,
        match=r"batchnorm.batch_size = 200, but there are 100 training samples: --set batchnorm.batch_size=100",
    ):
        prepared("tiny:batch_normed")
