"""A user's own data, losses and metrics: what they may return, and the messages otherwise."""

import math
import sys
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional as F

from swap_hpc.data import Batches, Dataset, load
from swap_hpc.data.fields import check_fields
from swap_hpc.data.identity import Identity
from swap_hpc.data.labels import check_labels
from swap_hpc.data.nested import leaves, mapped
from swap_hpc.data.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalisation_line
from swap_hpc.data.sampling import Key, Picks
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import parse
from swap_hpc.recipe.metrics import MetricChoice
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.run.dry_step import dry_step
from swap_hpc.run.prepare import prepare
from swap_hpc.train.job import Job
from swap_hpc.train.metrics import ACCURACY, TOP5, Metric, class_accuracy
from swap_hpc.train.objective import CLASSIFICATION, as_float32, objective

EMPTY: dict[str, int] = {}
IMAGES, LABELS = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module of the user's own, still empty."""
    module = ModuleType("own_parts")
    monkeypatch.setitem(sys.modules, "own_parts", module)
    return module


def loaded(returns: Any, own: ModuleType, **arguments: Any) -> Dataset:
    """Load data by a function that takes `size` and returns `returns`."""
    own.load = lambda path, size=8: returns  # type: ignore[attr-defined]
    return loaded_by("own_parts:load", **arguments)


def loaded_by(name: str, **arguments: Any) -> Dataset:
    recipe = tiny.recipe(data={"name": name, "arguments": arguments})
    return load(recipe.data, Team.alone(), 1)


def test_arrays_become_a_data_set(own: ModuleType) -> None:
    dataset = loaded(((IMAGES, LABELS.astype(np.int32)), (IMAGES[:2], [0, 3])), own, size=8)
    assert len(dataset.classes) == 4 and dataset.channels == 3 and dataset.image_size == (8, 8)
    assert dataset.train.labels.dtype == np.int64  # type: ignore[union-attr]


GOOD = (IMAGES, LABELS)
CHANNELS_FIRST = IMAGES.transpose(0, 3, 1, 2)
OTHERWISE = "for anything but images and classes, return a Dataset of swap_hpc.Batches"
UINT8 = f"they must be (N, H, W, C) uint8; {OTHERWISE}"
FROM_0 = f"they must be (N,) integers from 0; {OTHERWISE}"
WRONG = [
    (None, "returned a NoneType: a Dataset, or ((images, labels), (test images, test labels)), is"),
    (((np.zeros((6, 5)), LABELS), GOOD), f"returned images [6, 5] float64: {UINT8}"),
    (((IMAGES[0], LABELS), GOOD), f"returned images [8, 8, 3] uint8: {UINT8}"),
    (((CHANNELS_FIRST, LABELS), GOOD), "returned images [6, 3, 8, 8], which look like (N, C,"),
    (((IMAGES / 255, LABELS), GOOD), f"returned images [6, 8, 8, 3] float64: {UINT8}"),
    (((IMAGES, LABELS[:5]), GOOD), f"returned labels [5] int64: {FROM_0}"),
    (((IMAGES, LABELS - 1), GOOD), f"returned labels [6] int64: {FROM_0}"),
    ((GOOD, (IMAGES[:, :4], LABELS)), "training images of [8, 8, 3] and test images of [4, 8, 3]"),
]


@pytest.mark.parametrize(("returns", "message"), WRONG)
def test_a_wrong_data_set_is_explained(returns: Any, message: str, own: ModuleType) -> None:
    with pytest.raises(UserError) as raised:
        loaded(returns, own)
    assert message in str(raised.value)


def test_wrong_arguments_and_missing_modules_are_named(own: ModuleType) -> None:
    refused = "cannot be called with data.path and data.arguments: got an unexpected keyword"
    with pytest.raises(UserError, match=refused):
        loaded(None, own, colour=3)
    with pytest.raises(
        UserError,
        match=r"the data nowhere:load cannot be imported \(No module named 'nowhere'\): is it in ",
    ):
        loaded_by("nowhere:load")
    with pytest.raises(UserError, match="the loss own_parts:mse: own_parts has no mse; it has "):
        _ = tiny.job(loss="own_parts:mse").objective
    own.number = 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="the loss own_parts:number is a int: a function is needed"):
        _ = tiny.job(loss="own_parts:number").objective
    with pytest.raises(UserError, match='the model :build: write it as "package.module:function"'):
        tiny.model(tiny.job(model={"name": ":build"}))


def test_a_module_that_fails_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import numpy\nimport a_library_that_nobody_has\n")
    (tmp_path / "fails_here.py").write_text("import numpy\n\nnumpy.zeros(-1)\n")
    (tmp_path / "not_python.py").write_text("def build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    missing = "ModuleNotFoundError: No module named 'a_library_that_nobody_has'"
    negative = "ValueError: negative dimensions are not allowed"
    for name, message in (
        ("needs_more", rf"{missing} \(needs_more.py, line 2\)$"),
        ("fails_here", rf"{negative} \(fails_here.py, line 3\)$"),
        ("not_python", r"SyntaxError: .*\(not_python.py, line 1\)$"),
    ):
        with pytest.raises(UserError, match=f"the data {name}:load cannot be imported: {message}"):
            loaded_by(f"{name}:load")


def test_names_are_checked_where_the_recipe_is_read() -> None:
    fields = tiny.recipe().model_dump(mode="json", exclude_none=True)
    for wrong, message in (
        (
            {"data": {"name": "digit"}},
            "data.name: needs digits, cifar10, .* or \"package.module:function\" .given: 'digit'.",
        ),
        ({"loss": "mse"}, 'loss: needs cross_entropy or "package.module:function"'),
        ({"loss": "a:b", "label_smoothing": 0.1}, "label_smoothing applies to cross_entropy only"),
    ):
        with pytest.raises(UserError, match=message):
            parse(fields | wrong)


def test_a_part_of_custom_batches_is_asked_for_by_the_numbers_of_the_whole() -> None:
    asked: list[list[int]] = []

    def function(picks: Any, training: bool) -> Any:
        for pick in picks:
            asked.append(pick.indices.tolist())
            yield torch.zeros(len(pick.indices), 2), torch.zeros(len(pick.indices))

    part = Batches(10, function).take(np.array([1, 3, 5, 7])).take(np.array([3, 0]))
    assert len(part) == 2
    list(part.read(iter([Picks(np.array([0, 1]), None)]), training=True))
    assert asked == [[7, 1]]


def test_a_users_own_loss_and_score_are_used(own: ModuleType) -> None:
    own.loss = lambda outputs, targets: F.mse_loss(outputs[:, 0], targets.float())  # type: ignore[attr-defined]
    own.near = lambda outputs, targets: 1 / (1 + (outputs[:, 0] - targets).abs())  # type: ignore[attr-defined]
    objective = tiny.job(loss="own_parts:loss", metric="own_parts:near").objective
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1])
    assert objective.loss(outputs, targets) == 2 and objective.total_loss(outputs, targets) == 4
    assert objective.sums(outputs, targets).tolist() == pytest.approx([1 + 1 / 3])
    assert objective.evaluation(4, [1 + 1 / 3], 2).metrics == pytest.approx({"near": 2 / 3})


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
    scalar = r"returned a tensor \[\] float32: .* a tensor \[4\], is needed"
    with pytest.raises(UserError, match=f"the metric own_parts:mean {scalar}"):
        tiny.job(metric="own_parts:mean").objective.sums(outputs, targets)


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([0, 1, -100, 2, -100, 1]),
        torch.tensor([0, 1, 2, 2, 0, 1]),
        torch.full((6,), -100)[:0],
        torch.randint(3, (6, 4, 5)),
        torch.rand(6, 3),
        torch.rand(6, 3, 4, 5),
    ],
    ids=["ignored", "all", "none", "masks", "shares", "shares of pixels"],
)
def test_the_evaluated_loss_is_the_mean_that_training_takes(targets: torch.Tensor) -> None:
    outputs = torch.randn(len(targets), 3, *(targets.shape[1:] if targets.ndim == 3 else ()))
    if targets.ndim == 4:
        outputs = torch.randn(targets.shape)
    found = objective(tiny.recipe(), 3)
    total = found.total_loss(outputs, targets)
    expected = found.loss(outputs, targets) * len(targets) if len(targets) else torch.zeros(())
    torch.testing.assert_close(total, expected)
    assert CLASSIFICATION.total_loss(outputs, targets) == total


def test_a_metric_that_is_not_defined_is_nan_and_one_that_fails_is_named(own: ModuleType) -> None:
    def counts(outputs: Any, targets: Any) -> Any:
        return (targets == 7).sum().double()[None]

    own.recall = Metric(counts, lambda sums, samples: sums[0] / sums[0])  # type: ignore[attr-defined]
    own.typo = Metric(counts, lambda sums, samples: sums[1])  # type: ignore[attr-defined]
    undefined = tiny.job(metric="own_parts:recall").objective.evaluation(1.0, [0.0], 4)
    assert math.isnan(undefined.metrics["recall"])
    assert tiny.job(metric="own_parts:recall").objective.evaluation(1.0, [2.0], 4).main == 1
    job = tiny.job(metric="own_parts:typo")
    with pytest.raises(RunError, match="the metric typo fails on its sums: IndexError: .* line"):
        job.objective.evaluation(1.0, [0.0], 4)
    key = Key.of(0, PHASE_1)
    with pytest.raises(UserError, match="the metric typo fails on its sums: IndexError"):
        dry_step(tiny.model(job), job, job.recipe.large_batch, key, Team.alone())


SIX_NUMBERS, SIX_CLASSES = torch.rand(6), torch.tensor([0, 1, 2, 0, 1, 2])
NO_CLASSES = [
    (torch.rand(6, 1), SIX_NUMBERS, "a tensor [6, 1] float32 and a tensor [6] float32"),
    (torch.rand(6, 3), SIX_NUMBERS, "and a tensor [6] float32"),
    (torch.rand(6, 1), SIX_NUMBERS[:, None], "and a tensor [6, 1] float32"),  # would be 100 %
    (torch.rand(6, 1), SIX_CLASSES, "a tensor [6, 1] float32 and"),  # one logit for two classes
    (torch.rand(6, 3, 4), SIX_CLASSES[:, None].expand(6, 4), "a tensor [6, 3, 4] float32 and"),
    ({"logits": torch.rand(6, 3)}, SIX_CLASSES, "a dict and"),
    (torch.rand(6, 3), {"labels": SIX_CLASSES}, "and a dict"),
]


@pytest.mark.parametrize("metric", ["accuracy", "class_accuracy"])
@pytest.mark.parametrize(("outputs", "targets", "described"), NO_CLASSES)
def test_an_accuracy_of_what_has_no_classes_is_refused(
    outputs: Any, targets: Any, described: str, metric: str
) -> None:
    """A regression whose recipe names a loss and no metric has the metric accuracy."""
    found = objective(tiny.recipe(metrics=[metric]), 3)
    with pytest.raises(UserError, match=f"the metric {metric} needs logits") as raised:
        found.sums(outputs, targets)
    assert described in str(raised.value) and "metrics = [" in str(raised.value)
    shares = F.one_hot(SIX_CLASSES, 3).float()  # as mixup makes them
    expected = found.sums(10 * shares, SIX_CLASSES)
    assert torch.equal(found.sums(10 * shares, shares), expected) and expected[0] > 0


def test_custom_batches_may_be_a_list_and_must_be_those_asked_for() -> None:
    """Each evaluation hands over its picks once, and refuses a batch too few or of another size."""
    inputs, targets = torch.randn(9, 3, 4, 4), torch.arange(9) % 3

    def evaluated(function: Any) -> list[int]:
        """Return the number of test samples of two evaluations."""
        split = Batches(9, function)
        recipe = tiny.recipe(evaluate={"batch_size": 4})
        job = Job(recipe, Dataset(split, split, tuple("abc")), tiny.CPU)
        return [sum(len(found) for _, found in job.test_batches(Team.alone())) for _ in range(2)]

    def listed(picks: Any, training: bool) -> Any:
        return [(inputs[pick.indices], targets[pick.indices]) for pick in picks]

    assert evaluated(listed) == [9, 9]
    with pytest.raises(UserError, match="makes test batches ended early"):
        evaluated(lambda picks, training: listed([next(picks)], training))
    for batch, message in (
        ((inputs[:4], targets), r"returned targets \[9\] for 4 picked samples"),
        (({"a": inputs[:4], "b": inputs}, targets[:4]), r"returned inputs \[9, 3, 4, 4\] for 4"),
        ((inputs[:4], targets.sum()), r"returned targets \[\] for 4 picked samples"),
        ((inputs[:4].numpy(), targets[:4]), "returned a ndarray in its inputs: tensors are needed"),
        ((inputs[:4], (targets[:4], ["a"])), "returned a str in its targets: tensors are needed"),
        (((), targets[:4]), "returned a tuple in its inputs: tensors are needed"),
        (inputs[:4], r"returned a Tensor: a pair \(inputs, targets\) is needed"),
    ):
        with pytest.raises(UserError, match=message):
            evaluated(lambda picks, training, batch=batch: (batch for _ in picks))


def test_an_error_in_a_users_function_is_one_line_with_its_place(own: ModuleType) -> None:
    def function(picks: Any, training: bool) -> Any:
        for _ in picks:
            yield EMPTY["label"]

    split = Batches(9, function)
    job = Job(tiny.recipe(), Dataset(split, split, tuple("abc")), tiny.CPU)
    place = r"failed: KeyError: 'label' \(test_own.py, line \d+\)$"
    with pytest.raises(RunError, match=f"^the function that makes test batches {place}"):
        list(job.test_batches(Team.alone()))
    own.load = lambda path: EMPTY["label"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"^the data own_parts:load {place}"):
        loaded_by("own_parts:load")


class Noisy(torch.utils.data.Dataset[Any]):
    """A data set that draws; sample 7 has no label where `spoiled`."""

    def __init__(self, spoiled: bool = False):
        self.spoiled = spoiled

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        label = EMPTY["label"] if self.spoiled and index == 7 else index
        return {"x": torch.randn(3), "y": np.random.rand()}, label


def test_a_torch_data_set_gives_the_same_with_workers_and_names_its_errors() -> None:
    def streams(split: Batches) -> list[Any]:
        """Return two streams, read in turns, as those of two groups are."""
        job = Job(tiny.recipe(), Dataset(split, split, tuple("abc")), tiny.CPU)
        settings = job.recipe.large_batch.model_copy(update={"batch_size": 3})
        keys = [Key(0, Phase.REFINE, group) for group in (0, 1)]
        both = [job.training_batches(settings, key, Team.alone()) for key in keys]
        return [batch for pair in zip(*both, strict=True) for batch in pair]

    alone, helped = streams(Batches.of(Noisy())), streams(Batches.of(Noisy(), workers=1))
    assert len(alone) == 2 * 2 * 3  # groups, epochs, steps
    for (inputs, targets), (same_inputs, same_targets) in zip(alone, helped, strict=True):
        assert torch.equal(inputs["x"], same_inputs["x"]) and torch.equal(targets, same_targets)
        assert torch.equal(inputs["y"], same_inputs["y"]) and inputs["y"].shape == (3,)
    assert len({float(inputs["y"][0]) for inputs, _ in alone}) == len(alone)
    place = r"batches failed: KeyError: 'label' \(test_own.py, line \d+\)$"
    for workers in (0, 1):
        with pytest.raises(RunError, match=place):
            streams(Batches.of(Noisy(spoiled=True), workers=workers))


def test_the_built_in_loss_and_metrics_name_what_they_do_not_take() -> None:
    outputs, shares = torch.zeros(4, 7), torch.full((4, 3), 1 / 3)
    mixed = objective(tiny.recipe(), 3)
    with pytest.raises(UserError, match=r"tensor \[4, 7\] float32: logits \[4, 3\] are needed"):
        mixed.loss(outputs, shares)
    assert mixed.loss(outputs[:, :3], shares) == pytest.approx(np.log(3))
    for metric in (ACCURACY, TOP5, class_accuracy(7)):
        with pytest.raises(UserError, match="the outputs are a dict, and accuracy, top5 and"):
            metric({"logits": outputs}, torch.from_numpy(LABELS))
        with pytest.raises(UserError, match="the targets are a tuple"):
            metric(outputs, (shares, shares))  # type: ignore[arg-type]


def test_what_is_not_a_number_is_worse_than_any() -> None:
    for metric in (MetricChoice(name="a:b"), MetricChoice(name="a:b", smaller_is_better=True)):
        assert metric.better(-1e9, than=np.nan) and not metric.better(np.nan, than=-1e9)
        assert not metric.better(np.nan, than=np.nan)


def test_a_data_set_of_arrays_is_completed(own: ModuleType) -> None:
    split = Arrays(IMAGES, LABELS.astype(np.int64))
    bare = Dataset(split, split, ("a", "b", "c"))
    found = loaded(bare, own)
    assert found.image_size == (8, 8) and found.channels == 3
    assert len(found.mean) == len(found.std) == 3
    assert loaded(replace(bare, mean=(1.0, 2.0, 3.0)), own).mean == (1.0, 2.0, 3.0)
    assert loaded(replace(bare, notes=("by hand",)), own).notes == ("by hand",)
    other = Arrays(IMAGES[:, :4], LABELS.astype(np.int64))
    with pytest.raises(UserError, match=r"validation images of \[4, 8, 3\]: they must have"):
        loaded(replace(bare, validation=other), own)
    with pytest.raises(UserError, match="returned a Dataset without samples"):
        loaded(replace(bare, test=Arrays(IMAGES[:0], LABELS[:0])), own)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Six images of 10 x 8 pixels."""
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(6))
    for i, path in enumerate(paths):
        Image.fromarray(np.full((8, 10, 3), 40 * i, np.uint8)).save(path)
    return Files(paths, LABELS.astype(np.int64))


def test_a_data_set_of_files_is_completed_as_a_folder_is(files: Files, own: ModuleType) -> None:
    bare = Dataset(files, files, ("a", "b", "c"), validation=files)
    own.load = lambda path: bare  # type: ignore[attr-defined]
    data = {"name": "own_parts:load", "image_size": 8}
    job = Job(tiny.recipe(data=data), load(tiny.recipe(data=data).data, Team.alone(), 1), tiny.CPU)
    assert job.dataset.image_size == (8, 8) and job.dataset.mean == IMAGENET_MEAN
    line = "images are normalised by ImageNet's mean and standard deviation"
    assert normalisation_line(job.dataset, job.recipe.data) == [line]
    for name in ("validation", "test"):
        ((images, labels),) = job.test_batches(Team.alone(), name)
        assert images.shape == (6, 3, 8, 8) and labels.tolist() == LABELS.tolist()
        grey = (images[:, 0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]).round()
        assert grey.tolist() == [0, 40, 80, 120, 160, 200]
    sized = replace(bare, image_size=(6, 6), mean=(1.0,) * 3, std=(2.0,) * 3)
    own_statistics = loaded(sized, own)
    assert (own_statistics.image_size, own_statistics.mean) == ((6, 6), (1.0,) * 3)
    as_lists = Files(list(files.paths), files.labels.tolist())  # type: ignore[arg-type]
    assert loaded(replace(sized, train=as_lists), own).train.contents == files.contents
    for wrong, message in (
        (bare, r"a Dataset of files without an image_size: set data.image_size \(pixels\)"),
        (replace(sized, channels=1), "channels = 1: files are read with 3"),
        (replace(sized, std=(1.0,)), "whose std has 1 numbers, but the images have 3 channels"),
        (
            replace(sized, test=Arrays(IMAGES, LABELS)),
            r"different kinds of splits \(train Files, validation Files, test Arrays\): make all",
        ),
        (
            replace(sized, test=Batches(6, lambda picks, training: ())),
            r"\(train Files, validation Files, test Batches\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            loaded(wrong, own)


RANDOM = torch.utils.data.TensorDataset(torch.zeros(6, 4), torch.from_numpy(LABELS))
SPLIT = Arrays(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("train", "classes", "message"),
    [
        (RANDOM, "abc", r"whose train is a TensorDataset: read a torch Dataset with swap_hpc.Bat"),
        (GOOD, "abc", r"whose train is a tuple: write a pair of arrays as swap_hpc.data.Arrays\("),
        (None, "abc", "whose train is a NoneType: an Arrays, Files, Batches or Graph is needed"),
        (SPLIT, 10, r"with classes = 10: their names are needed, .* tuple\(map\(str, range\(10\)"),
        (SPLIT, None, "with classes = None: their names are needed"),
        (Arrays(IMAGES, LABELS[:5]), "abc", r"returned labels \[5\] int64 for 6 images: they must"),
        (
            Arrays(IMAGES, np.array(list("abcabc"))),
            "abc",
            r"returned labels \[6\] <U1 for 6 images",
        ),
    ],
)
def test_a_wrong_dataset_is_explained(
    train: Any, classes: Any, message: str, own: ModuleType
) -> None:
    names = tuple(classes) if isinstance(classes, str) else classes
    with pytest.raises(UserError, match=message):
        loaded(Dataset(train, SPLIT, names), own)


def test_labels_are_numbers_of_classes_where_the_loss_is_cross_entropy(own: ModuleType) -> None:
    good, beyond = Arrays(IMAGES, LABELS), Arrays(IMAGES, LABELS + 1)
    whole = Dataset(good, good, ("a", "b", "c"), validation=good)
    check_labels("own", whole, "cross_entropy")
    for key in whole.splits:
        spoiled = replace(whole, **{str(key): beyond})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"the {key} split of own has the label 3 beside 3 cl"):
            check_labels("own", spoiled, "cross_entropy")
        check_labels("own", spoiled, "mine:loss")
    below = replace(whole, test=Arrays(IMAGES, LABELS - 1))
    with pytest.raises(
        UserError, match=r"the label -1 beside 3 classes \(a, b, c\), whose numbers"
    ):
        check_labels("own", below, "cross_entropy")
    ages = replace(whole, train=Arrays(IMAGES, LABELS.astype(np.float32)))
    with pytest.raises(UserError, match=r"targets \[6\] float32, and cross_entropy takes class n"):
        check_labels("own", ages, "cross_entropy")
    shares = Arrays(IMAGES, np.full((6, 3), 1 / 3, np.float32))
    check_labels("own", Dataset(shares, shares, whole.classes), "cross_entropy")


def test_images_have_targets_of_any_shape_for_a_loss_of_ones_own(own: ModuleType) -> None:
    targets = np.arange(12, dtype=np.float64).reshape(6, 2)
    split = Arrays(IMAGES, targets)
    recipe = tiny.recipe(data={"name": "own_parts:load", "validation": 2}, loss="own_parts:loss")
    own.load = lambda path: Dataset(split, split, ())  # type: ignore[attr-defined]
    own.loss = F.mse_loss  # type: ignore[attr-defined]
    dataset = load(recipe.data, Team.alone(), 1)
    check_fields(recipe.data, recipe.augment, dataset)
    job = Job(recipe, dataset, tiny.CPU)
    ((_, tested),) = job.test_batches(Team.alone())
    assert tested.dtype == torch.float32 and tested.tolist() == targets.tolist()
    ((_, chosen),) = job.test_batches(Team.alone(), "validation")
    assert len(chosen) == 2 and all(row in targets.tolist() for row in chosen.tolist())
    other = replace(dataset, test=Arrays(IMAGES, np.zeros((6, 2), np.float32)))
    assert Identity.of(dataset).differ(Identity.of(other), ("test",))
    mixup = tiny.recipe(augment={"mixup": 0.2}).augment
    with pytest.raises(UserError, match="mix class numbers, and the targets of own_parts:load"):
        check_fields(recipe.data, mixup, dataset)


def test_outputs_of_any_shape_leave_autocast_as_float32() -> None:
    low, whole = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    found = as_float32({"a": low, "b": (low, [whole, None])})
    pair = namedtuple("pair", "logits aux")
    assert as_float32(pair(low, whole)).logits.dtype == torch.float32
    assert found["a"].dtype == found["b"][0].dtype == torch.float32
    assert found["b"][1][0] is whole and found["b"][1][1] is None


def test_any_mapping_is_a_nest() -> None:
    image = torch.zeros(2)
    found = mapped(lambda tensor: tensor + 1, UserDict(x=image, y=[UserDict(z=image)]))
    assert type(found) is dict and type(found["y"][0]) is dict  # as a tokenizer's BatchEncoding
    assert found["x"].tolist() == found["y"][0]["z"].tolist() == [1, 1]
    assert len(list(leaves(UserDict(x=image, y=(image, image))))) == 3
    assert mapped(lambda tensor: 3, OrderedDict({1: image})) == {1: 3}

    def function(picks: Any, training: bool) -> Any:
        for pick in picks:
            yield UserDict(x=torch.zeros(len(pick.indices), 1)), torch.zeros(len(pick.indices))

    split = Batches(4, function)
    job = Job(tiny.recipe(evaluate={"batch_size": 4}), Dataset(split, split, ("a",)), tiny.CPU)
    ((inputs, _),) = job.test_batches(Team.alone())
    assert type(inputs) is dict and inputs["x"].shape == (4, 1)


def test_modules_of_the_folder_that_a_job_starts_in_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here_it_is.py").write_text("def load(path):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match="returned a NoneType"):
        loaded_by("here_it_is:load")


def test_sizes_of_the_batch_norm_refresh_matter_only_to_models_with_batch_norm() -> None:
    def prepared(model: str) -> None:
        sizes = {"batch_size": 200, "samples": 200}
        recipe = tiny.recipe(model={"name": model}, data={"samples": 100}, batchnorm=sizes)
        prepare(recipe, Team.alone(), Team.alone())

    prepared("tiny:plain")
    too_large = "batchnorm.batch_size = 200, but there are 100 training samples"
    with pytest.raises(UserError, match=f"{too_large}: --set batchnorm.batch_size=100"):
        prepared("tiny:batch_normed")
