"""The fields of a recipe: typed, validated and frozen.

Batch sizes, epochs and learning rates are used as written, whatever the number of ranks: nothing is scaled
silently. `run.part.check_ranks` checks what depends on the number of ranks.
"""

import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from swap_hpc.recipe.schedule import Knots

Count = Annotated[int, Field(ge=1)]


CountOrZero = Annotated[int, Field(ge=0)]


Sizes: TypeAlias = tuple[tuple[CountOrZero, Count], ...]


def _checked_knots(knots: Knots) -> Knots:
    if not knots:
        raise ValueError("needs at least one [epoch, value] pair")
    if any(not math.isfinite(x) or x < 0 for knot in knots for x in knot):
        raise ValueError("needs finite epochs and values of at least 0")
    if any(left >= right for (left, _), (right, _) in pairwise(knots)):
        raise ValueError("needs [epoch, value] pairs in ascending order of their epochs")
    return knots


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("needs two positive numbers, the smaller one first")
    return pair


def _checked_sizes(sizes: Sizes) -> Sizes:
    if (
        not sizes
        or sizes[0][0] != 0
        or any(left >= right for (left, _), (right, _) in pairwise(sizes))
    ):
        raise ValueError(
            "needs [epoch, pixels] pairs, the first one at epoch 0, in ascending order of their epochs"
        )
    return sizes


def _constant_as_knots(value: Any) -> Any:
    if isinstance(value, int | float):
        return [[0, value]]
    if not isinstance(value, list | tuple) or any(
        not isinstance(knot, list | tuple) or len(knot) != 2 for knot in value
    ):
        raise ValueError("needs a number, or pairs from an epoch on: [[0, 0.1], [8, 0.0]]")
    return value


def _only_finite(arguments: Any) -> None:
    """Raises ValueError for a number that is none: a recipe is written back, and JSON has neither NaN nor infinity."""
    if isinstance(arguments, float) and not math.isfinite(arguments):
        raise ValueError(f"{arguments} is no finite number")
    for each in (
        arguments.values()
        if isinstance(arguments, dict)
        else arguments
        if isinstance(arguments, list)
        else ()
    ):
        _only_finite(each)


def on_disk(text: Any) -> Any:
    """A name in a recipe, which is UTF-8 in any locale, as the same bytes name a file; `from_disk` is the way back."""
    return os.fsdecode(text.encode()) if isinstance(text, str) else text


def from_disk(name: str | Path) -> str:
    """Text for a recipe. Raises UnicodeDecodeError for a name that is no UTF-8."""
    return os.fsencode(name).decode()


def _from_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("needs a path that begins at a home that there is") from None


Schedule = Annotated[Knots, BeforeValidator(_constant_as_knots), AfterValidator(_checked_knots)]


ImageSizes = Annotated[Sizes, BeforeValidator(_constant_as_knots), AfterValidator(_checked_sizes)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


Place = Annotated[
    Path,
    BeforeValidator(on_disk),
    AfterValidator(_from_home),
    PlainSerializer(from_disk, str, when_used="json"),
]


DataName = Literal["digits", "cifar10", "cifar100", "folder", "webdataset", "synthetic"]


def _name(*known: str) -> Any:
    """The type of a name: one of those, or the import path of a function of the user's."""

    def checked(name: str) -> str:
        if name not in known and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError(f'needs {", ".join(known)} or "package.module:function"')
        return name

    return Annotated[str, AfterValidator(checked)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(_Section):
    """`name` and the builder's own arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    name: str
    """`resnet9`, `torchvision:NAME`, `timm:NAME` (where timm is installed) or `package.module:function`; the section's further keys
    are the builder's arguments."""
    weights: Place | None = None
    """A .safetensors file to start from."""

    @model_validator(mode="after")
    def _finite_arguments(self) -> "Model":
        _only_finite(self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Data(_Section):
    """What is trained on."""

    name: _name(*get_args(DataName))  # type: ignore[valid-type]
    """A data set that the package knows, a `folder` or `webdataset` shards of images, or `package.module:function`."""
    arguments: dict[str, Any] = {}
    """What a function of your own is called with, after `path`."""
    path: Place = Path("data")
    """The folder with the data, or to download it to; `--data`."""
    test_every: Annotated[int, Field(ge=2)] | None = None
    """Of a `folder` that holds a folder per class, and is not split: every so-many-th image of a class, by name, tests; none: the folder
    has `train` and `test`."""
    validation: CountOrZero = 0
    """Training samples, always the same ones, that are set aside and evaluated on instead of the test split."""
    image_size: ImageSizes | None = None
    """Pixels, or `[epoch, pixels]` pairs, each valid from its epoch of the run on (the refinement begins at `large_batch.epochs`);
    none: the files' own size, which must then be one for all."""
    evaluation_size: Count | None = None
    """Pixels, of files that are read in every epoch; none: the last of `image_size`."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the evaluated square as a share of the image's shorter side."""
    memory_gib: Annotated[float, Field(ge=0)] = 4.0
    """Image files are decoded into each rank's memory up to this size, else read in every epoch; so are images of several sizes. An
    eighth of it, but at least 96 MiB or one image, is decoded at once."""
    classes: Count = 10
    """Of the data `synthetic`."""
    samples: Count = 1024
    """Training samples of the data `synthetic`; a quarter as many test samples."""

    @model_validator(mode="after")
    def _arguments_of_its_own(self) -> "Data":
        if self.arguments and ":" not in self.name:
            raise ValueError(f"arguments are for a function of your own: {self.name} takes none")
        if self.test_every and self.name != "folder":
            raise ValueError(f"test_every splits a folder of images: {self.name} comes split")
        _only_finite(self.arguments)
        return self

    def size_at(self, epoch: int) -> int | None:
        """The images' side in pixels in an epoch of the run, from 0."""
        return next(
            (pixels for begin, pixels in reversed(self.image_size or ()) if begin <= epoch), None
        )

    @property
    def last_size(self) -> int | None:
        return self.image_size[-1][1] if self.image_size else None


class Augment(_Section):
    """Of training images. In memory: pad, crop, flip, cutout. Streamed from files: random resized crop and flip."""

    pad: CountOrZero = 0
    """Pixels on each side, by reflection; then a random crop of the original size."""
    flip: bool = False
    """Mirror half of the images."""
    cutout: CountOrZero = 0
    """Side in pixels of a square set to the mean, after padding and cropping."""
    crop_area: Range = (0.08, 1.0)
    """Streamed: the share of the image's area that is cropped."""
    crop_ratio: Range = (0.75, 4 / 3)
    """Streamed: width / height of the crop."""


class Optimizer(_Section):
    """SGD, or LARS for very large batches, in both phases."""

    name: Literal["sgd", "lars"] = "sgd"
    """LARS: arXiv 1708.03888."""
    momentum: Fraction = 0.9
    """Its buffer starts at zero in each phase."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Added to the gradient, as a share of the weights."""
    decay_vectors: bool = True
    """Weight decay also of batch norm's parameters and of biases; false: LARS, too, leaves them alone."""
    trust: Annotated[float, Field(gt=0)] = 0.001
    """LARS: a step's size as a share of the weights', at a learning rate of 1."""
    fused: bool = False
    """SGD: a step in one kernel for each few tensors, which a GPU is given sooner; rounds differently."""

    @model_validator(mode="after")
    def _settings_that_fit(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs a momentum above 0")
        if self.fused and self.name != "sgd":
            raise ValueError(f"fused is SGD's: {self.name} has no such step")
        return self


class _Phase(_Section):
    batch_size: Count
    """Samples per step, all ranks of the phase's team together."""
    epochs: CountOrZero
    """Of phase 1 at most; of the refinement per cycle. 0: the phase is left out."""
    learning_rate: Schedule
    """A number, or `[epoch, value]` knots, linear between them."""
    accumulate: Count = 1
    """Parts in which a rank computes its share of a batch, one after the other, gradients added up: less memory; batch norm sees a part."""


class LargeBatch(_Phase):
    """Phase 1: all ranks train one model, for at most `epochs`."""

    cycles: ClassVar[int] = 1
    average_every_steps: ClassVar[int | None] = None
    stop_accuracy: Fraction | None = None
    """Running accuracy of an epoch's augmented training samples at which the phase ends."""
    batchnorm_batch_size: Count | None = None
    """What batch norm sees, a part of a rank's share; where stated, other sizes are refused."""


class Refine(_Phase):
    """Phase 2: each group trains its copy alone, `epochs` per cycle; 0: no refinement and no averaging, plain SGD."""

    stop_accuracy: ClassVar[float | None] = None
    cycles: Count = 1
    """Of the refinement: its schedule restarts with each; a group's weights at each one's end enter the average."""
    evaluate_average: CountOrZero = 0
    """Epochs between evaluations of the averaged model on the way, for which the groups wait for each other; 0: only at the end."""
    average_every_steps: Count | None = None
    """Steps after which the groups go on from the average of their weights, each with its own momentum and statistics: post-local SGD
    (Lin et al., arXiv 1808.07217); none: they go alone to the end."""

    @model_validator(mode="after")
    def _one_way_to_meet(self) -> "Refine":
        if self.average_every_steps and (self.cycles > 1 or self.evaluate_average):
            raise ValueError(
                "average_every_steps trains on one schedule to its end: it goes with cycles = 1 and evaluate_average = 0 only"
            )
        return self


class BatchNorm(_Section):
    """The re-estimation of batch-norm statistics after averaging."""

    batch_size: Count = 512
    """Samples of which each batch's statistics are taken, whatever the number of ranks."""
    samples: Count | None = None
    """Training samples to pass; none: all (whole batches)."""


class Evaluate(_Section):
    """Test loss and accuracy on the way."""

    batch_size: Count = 500
    """Samples per step of one rank."""
    every: CountOrZero = 1
    """Epochs between evaluations within a phase; 0: only at its end."""


class Checkpoint(_Section):
    """Saves to continue from. A stop on request saves, too."""

    epochs: CountOrZero = 1
    """Epochs between saves at epochs' ends; 0: only where `minutes` have passed, where groups wait for each other, and at a phase's end."""
    min_seconds: Annotated[float, Field(ge=0)] = 10.0
    """At least so many between saves at epochs' ends, where epochs are short; 0: a save at each that `epochs` names."""
    minutes: Annotated[float, Field(ge=0)] = 10.0
    """At most so many between saves inside an epoch; 0: none there."""
    snapshots: CountOrZero = 0
    """Epochs between the weights that are kept for `swap-hpc trajectory`; 0: none are."""

    def saves(self, epochs: int, seconds: float) -> int:
        """The number of saves at epochs' ends in that many epochs, each of that many seconds."""
        if not self.epochs:
            return 0
        rest = math.ceil(self.min_seconds / (self.epochs * seconds)) if seconds else 1
        return epochs // (self.epochs * max(1, rest))


class Watchdog(_Section):
    """What ends a job that hangs."""

    minutes: Annotated[float, Field(ge=0)] = 10.0
    """Without a step or a batch, after which a rank counts as hanging and the job ends; 0: never."""


class Recipe(_Section):
    """An experiment."""

    name: str = "recipe"
    """Of the run's folder, where `--out` does not say; as it stands, the file's name."""
    seed: CountOrZero = 0
    """Of the weights and of all that is random: order, augmentation, dropout."""
    groups: Count = 1
    """SWAP workers: the paper's W."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; weights and gradients stay float32. `fp32` on a GPU: convolutions in TF32, as is torch's default."""
    compile: bool = False
    """A step's forward and backward pass by torch.compile: for GPUs; the first steps take a minute. Needs a C compiler and Python's
    headers where the ranks run."""
    channels_last: bool = False
    """Convolutions' weights lie in memory with the channels last, as images do here: faster on some GPUs; rounds differently."""
    cudnn_benchmark: bool = False
    """cuDNN tries its algorithms for each new shape and takes the fastest: faster, and another run may take other ones."""
    deterministic: bool = False
    """Only algorithms of torch and cuDNN that repeat to the bit on a GPU, slower ones; what has none is refused in the first step."""
    loss: _name("cross_entropy") = "cross_entropy"  # type: ignore[valid-type]
    """Mean loss of `(outputs, targets)`, a scalar: `cross_entropy` or `package.module:function`."""
    metric: _name("accuracy") = "accuracy"  # type: ignore[valid-type]
    """Each sample's score (n,) for `(outputs, targets)`, the more the better: `accuracy` or `package.module:function`. Files call its
    mean the accuracy."""
    label_smoothing: Fraction = 0.0
    """Of the training loss, in both phases."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where torch sees one."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, every group a run of its own."""
    model: Model
    data: Data
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    large_batch: LargeBatch
    refine: Refine
    batchnorm: BatchNorm = BatchNorm()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    watchdog: Watchdog = Watchdog()

    @model_validator(mode="after")
    def _something_to_do(self) -> "Recipe":
        if self.large_batch.epochs == 0 and self.refine.epochs == 0:
            raise ValueError(
                "large_batch.epochs and refine.epochs are both 0: there is nothing to train"
            )
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                "deterministic and cudnn_benchmark exclude each other: what is chosen by its speed does not repeat"
            )
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                "label_smoothing is of cross_entropy: a loss of your own brings its own"
            )
        if self.large_batch.epochs == 0 and self.model.weights is None:
            raise ValueError(
                "large_batch.epochs = 0 refines a model that exists: name its file in model.weights"
            )
        return self

    def to_toml(self) -> str:
        """The recipe as resolved; `load_recipe` reads it again."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
