"""The fields of a recipe: typed, validated and frozen.

Batch sizes, epochs and learning rates are used as written, for any number of ranks: nothing is
scaled silently. `run.checks.check_ranks` checks the fields that depend on the number of ranks.
"""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from swap_hpc.recipe.values import (
    Count,
    CountOrZero,
    DataSource,
    Fraction,
    ImageSizes,
    LossName,
    MetricName,
    Place,
    Range,
    Schedule,
    check_finite,
)


class Section(BaseModel):
    """A table of a TOML file: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Section):
    """The model: the name of its builder and, as further keys, the builder's arguments."""

    model_config = ConfigDict(extra="allow")
    name: str
    """Builder of the model: `resnet9`, `torchvision:NAME`, `timm:NAME` (if timm is installed) or
    `package.module:function`. It is called with the section's further keys as arguments."""
    weights: Place | None = None
    """A `.safetensors` file with the initial weights; none: the builder's own initialisation."""

    @model_validator(mode="after")
    def _arguments_are_finite(self) -> "Model":
        check_finite(self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The builder's arguments: all keys of the section that are not fields."""
        return dict(self.model_extra or {})


class Data(Section):
    """The data set, and how its images are read."""

    name: DataSource
    """Source of the images: a built-in data set (`digits`, `cifar10`, `cifar100`, `synthetic`), a
    `folder` of images, `webdataset` shards, or `package.module:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of your own function in `name`, which is called with `path` first."""
    path: Place = Path("data")
    """Folder that holds the data or receives the download; the option `--data` sets it."""
    test_every: Annotated[int, Field(ge=2)] | None = None
    """For a `folder` with one subfolder per class and no splits: hold out every N-th image of each
    class (sorted by name) as the test split. None: the folder has `train` and `test`."""
    validation: CountOrZero = 0
    """Training samples to hold out, always the same ones; they replace the test split in all
    evaluations. 0: train on all samples and evaluate on the test split."""
    image_size: ImageSizes | None = None
    """Side of training images in pixels, or `[epoch, pixels]` pairs, each valid from its epoch of
    the run on; the refinement begins at epoch `large_batch.epochs`. None: the size of the files,
    which must all have the same one."""
    evaluation_size: Count | None = None
    """Side of evaluated images in pixels, for files that are read in every epoch. None: the last
    `image_size`."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the evaluated centre square as a fraction of the image's shorter side; 1 keeps the
    largest square."""
    memory_gib: NonNegativeFloat = 4.0
    """Memory for decoded image files, in GiB per rank. A data set that fits is decoded once and
    kept; a larger one, or one with several image sizes, is read in every epoch. Decoding uses up
    to an eighth of it at a time, but at least 96 MiB or one image."""
    classes: Count = 10
    """Number of classes of the `synthetic` data."""
    samples: Count = 1024
    """Number of training samples of the `synthetic` data, which has a quarter as many test
    samples."""

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> "Data":
        if self.arguments and ":" not in self.name:
            raise ValueError(f"arguments are for a function of your own: {self.name} takes none")
        if self.test_every and self.name != "folder":
            raise ValueError(f"test_every splits a folder of images: {self.name} comes split")
        check_finite(self.arguments)
        return self

    def size_at(self, epoch: int) -> int | None:
        """Return the side of training images in pixels in an epoch of the run, counted from 0."""
        sizes = [pixels for begin, pixels in self.image_size or () if begin <= epoch]
        return sizes[-1] if sizes else None

    @property
    def last_size(self) -> int | None:
        """The side of training images in pixels at the end of the run."""
        return self.image_size[-1][1] if self.image_size else None


class Augment(Section):
    """The augmentation of training images, of data in memory or of files read in every epoch."""

    pad: CountOrZero = 0
    """In memory: pixels added on each side by reflection, before a random crop back to the
    original size."""
    flip: bool = False
    """Mirror each image horizontally with probability 1/2, in memory and from files."""
    cutout: CountOrZero = 0
    """In memory: side in pixels of a square, set to the data set's mean after the crop."""
    crop_area: Range = (0.08, 1.0)
    """From files: smallest and largest area of the crop, as fractions of the image's area."""
    crop_ratio: Range = (0.75, 4 / 3)
    """From files: smallest and largest aspect ratio of the crop, width / height."""


class Optimizer(Section):
    """The optimizer of both phases: SGD, or LARS for very large batches."""

    name: Literal["sgd", "lars"] = "sgd"
    """`sgd`, or `lars` (arXiv 1708.03888)."""
    momentum: Fraction = 0.9
    """Momentum; its buffer starts at zero in each phase."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 regularisation: this fraction of the weights is added to their gradient."""
    decay_vectors: bool = True
    """Also decay batch-norm parameters and biases. False: they are not decayed, and LARS updates
    them as SGD does."""
    trust: PositiveFloat = 0.001
    """LARS: norm of a step relative to the norm of the weights, at a learning rate of 1."""
    fused: bool = False
    """SGD: update several tensors in one kernel, which takes fewer launches on a GPU. It rounds
    differently."""

    @model_validator(mode="after")
    def _fields_fit_the_optimizer(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs a momentum above 0")
        if self.fused and self.name != "sgd":
            raise ValueError(f"fused is for sgd only: {self.name} has no fused step")
        return self


class _Phase(Section):
    batch_size: Count
    """Samples per step over all ranks of the phase's team: the world in phase 1, a group in phase
    2."""
    epochs: CountOrZero
    """Epochs: at most this many in phase 1, exactly this many per cycle of the refinement. 0 skips
    the phase."""
    learning_rate: Schedule
    """Learning rate: a constant, or `[epoch, value]` knots with linear interpolation at every
    step."""
    accumulate: Count = 1
    """Parts into which a rank cuts its share of a batch; their gradients are added up. More parts
    need less memory, and batch norm sees smaller batches."""


class LargeBatch(_Phase):
    """Phase 1: all ranks train one model, for at most `epochs`."""

    cycles: ClassVar[int] = 1
    average_every_steps: ClassVar[int | None] = None
    stop_accuracy: Fraction | None = None
    """Training accuracy at which the phase ends: the mean over an epoch's augmented samples. None:
    it runs for all `epochs`."""
    batchnorm_batch_size: Count | None = None
    """Samples per rank that batch norm must see at once: a rank's share of the batch, divided by
    `accumulate`. A number of ranks that gives another size is refused. None: any is accepted."""


class Refine(_Phase):
    """Phase 2: each group trains its own copy for `epochs` per cycle; 0: plain SGD alone."""

    stop_accuracy: ClassVar[float | None] = None
    cycles: Count = 1
    """Number of cycles. The learning-rate schedule restarts with each, and each adds a group's
    weights at its end to the average."""
    evaluate_average: CountOrZero = 0
    """Epochs between evaluations of the averaged model during the refinement, for which the groups
    wait for each other. 0: only at the end."""
    average_every_steps: Count | None = None
    """Steps between averages of the groups' weights, from which all groups continue, each with its
    own momentum and batch-norm statistics: post-local SGD (Lin et al., arXiv 1808.07217). None: the
    groups are averaged at the end only."""

    @model_validator(mode="after")
    def _one_way_to_average(self) -> "Refine":
        if self.average_every_steps and (self.cycles > 1 or self.evaluate_average):
            raise ValueError(
                "average_every_steps needs one schedule to the end: "
                "set cycles = 1 and evaluate_average = 0"
            )
        return self


class BatchNorm(Section):
    """The re-estimation of batch-norm statistics after averaging."""

    batch_size: Count = 512
    """Samples per batch whose statistics are estimated together, for any number of ranks."""
    samples: Count | None = None
    """Training samples to use, cut to whole batches; more give a better estimate. None: all."""


class Evaluate(Section):
    """Test loss and accuracy during training."""

    batch_size: Count = 500
    """Samples per step and rank; affects speed and memory only."""
    every: CountOrZero = 1
    """Epochs between evaluations within a phase; 0: only at its end."""


class Checkpoint(Section):
    """Saves to resume from. A requested stop always saves as well."""

    epochs: CountOrZero = 1
    """Epochs between saves at the end of an epoch. 0: only at the end of a phase, where groups wait
    for each other, and after `minutes`."""
    min_seconds: NonNegativeFloat = 10.0
    """Shortest time in seconds between saves at the end of an epoch, for short epochs. 0: save
    whenever `epochs` asks for it."""
    minutes: NonNegativeFloat = 10.0
    """Longest time in minutes without a save inside an epoch; 0: no saves inside an epoch."""
    snapshots: CountOrZero = 0
    """Epochs between snapshots of the weights, which `swap-hpc trajectory` reads; 0: none."""

    def saves(self, epochs: int, seconds: float) -> int:
        """Return the number of saves at the end of an epoch, for epochs of `seconds` each."""
        if not self.epochs:
            return 0
        if not seconds:
            return epochs // self.epochs
        # A save is due every `self.epochs` epochs, but is left out until `min_seconds` have passed.
        interval = math.ceil(self.min_seconds / (self.epochs * seconds))
        return epochs // (self.epochs * max(1, interval))


class Watchdog(Section):
    """The end of a job that hangs."""

    minutes: NonNegativeFloat = 10.0
    """Time in minutes without a step or a batch after which a rank counts as hanging and the job
    ends; 0: never."""


class Recipe(Section):
    """An experiment."""

    name: str = "recipe"
    """Name of the run's folder if `--out` is not given. A recipe file without it is named after
    the file."""
    seed: CountOrZero = 0
    """Seed of the initial weights and of all randomness: sample order, augmentation, dropout."""
    groups: Count = 1
    """Number of SWAP workers, the paper's W: models that phase 2 refines independently."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass; weights and gradients stay float32. With `fp32`, convolutions
    on a GPU use TF32, which is torch's default."""
    compile: bool = False
    """Compile the forward and backward pass with torch.compile, for GPUs. The first steps take a
    minute. The ranks' hosts need a C compiler and Python's headers."""
    channels_last: bool = False
    """Store convolution weights with the channels last, as images are stored. Faster on some GPUs;
    rounds differently."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms for each new shape and keep the fastest. Faster, but another
    run may choose other algorithms."""
    deterministic: bool = False
    """Use only algorithms of torch and cuDNN that repeat bit for bit on a GPU; they are slower. A
    model that needs an operation without one is refused in the first step."""
    loss: LossName = "cross_entropy"
    """Training loss, (outputs, targets) -> scalar mean over the samples: `cross_entropy` or
    `package.module:function`."""
    metric: MetricName = "accuracy"
    """Score, (outputs, targets) -> (n,) with one value per sample, larger is better: `accuracy` or
    `package.module:function`. Files call its mean the accuracy."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the training loss in both phases; 0: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; `auto`: a GPU if torch finds one, else the CPU."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, with each group as its own run."""
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
    def _fields_fit_together(self) -> "Recipe":
        if self.large_batch.epochs == 0 and self.refine.epochs == 0:
            raise ValueError(
                "large_batch.epochs and refine.epochs are both 0: there is nothing to train"
            )
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                "deterministic and cudnn_benchmark exclude each other: "
                "an algorithm that is chosen by its speed does not repeat"
            )
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                "label_smoothing applies to cross_entropy only: smooth the labels in your own loss"
            )
        if self.large_batch.epochs == 0 and self.model.weights is None:
            raise ValueError(
                "large_batch.epochs = 0 refines a model that exists: name its file in model.weights"
            )
        return self

    def to_toml(self) -> str:
        """Return the complete recipe, with all defaults, as TOML that `load_recipe` reads."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
