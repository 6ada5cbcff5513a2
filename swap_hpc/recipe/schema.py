"""The fields of a recipe: typed, validated and frozen.

Batch sizes, epochs and learning rates are used as written, for any number of ranks: nothing is
scaled silently. `run.checks.check_ranks` checks the fields that depend on the number of ranks.
"""

import math
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BeforeValidator, NonNegativeFloat, model_validator

from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data, Model
from swap_hpc.recipe.metrics import MetricChoice, Metrics, as_list, checked_metrics
from swap_hpc.recipe.optimizer import Optimizer
from swap_hpc.recipe.schedule import is_constant
from swap_hpc.recipe.section import Section
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.recipe.values import Count, CountOrZero, Fraction, LossName, Precision
from swap_hpc.recipe.wording import count


class BatchNorm(Section):
    """The re-estimation of batch-norm statistics after averaging."""

    batch_size: Count = 512
    """Samples per batch whose statistics are estimated together, for any number of ranks."""
    samples: Count | None = None
    """Training samples to use, cut to whole batches; more give a better estimate. None: all."""


class Evaluate(Section):
    """The loss and the metrics on the validation split, or the test split if there is none."""

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
    keep: bool = False
    """Keep the last save of each part of a complete run, with the optimizer's state, so that
    `--extend` can give it more epochs."""

    best: bool = False
    """Also leave the weights of phase 1 and of each group at the epoch with the best main metric on
    validation samples, as `large_batch-best.safetensors`, `group-000-best.safetensors`. What is
    refined and averaged does not change. Needs a validation split."""

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
    precision: Precision = "fp32"
    """Precision of the forward pass; weights, gradients and averages stay float32. With `fp32`,
    convolutions on a GPU use TF32, which is torch's default. `bf16` needs a GPU of compute
    capability 8.0 (A100) or newer. `fp16`, for older GPUs, scales the loss dynamically: a step
    whose gradients overflow is skipped on all ranks."""
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
    metrics: Annotated[Metrics, BeforeValidator(as_list), AfterValidator(checked_metrics)] = (
        MetricChoice(name="accuracy"),
    )
    """What is reported besides the loss; the first one is the main metric, by which choices are
    made. `accuracy`, `top5`, `class_accuracy` (the mean over the classes; files have each class),
    or `package.module:function`: (outputs, targets) -> (n,) with one value per sample, whose mean
    is reported under the function's name, or a `swap_hpc.Metric`. Larger values are better; of
    `{ name = "package.module:function", smaller_is_better = true }` smaller ones."""
    label_smoothing: Fraction = 0.0
    """Label smoothing of the training loss in both phases; 0: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; `auto`: a GPU if torch finds one, else the CPU."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, with each group as its own run."""
    tracker: Literal["wandb", "mlflow"] | None = None
    """Also send the metrics to Weights & Biases or MLflow, with each group as its own run. Their
    own variables say where to, such as `WANDB_PROJECT`, `WANDB_MODE`, `MLFLOW_TRACKING_URI`,
    `MLFLOW_EXPERIMENT_NAME`. A service that fails does not end the run."""
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

    @model_validator(mode="before")
    @classmethod
    def _one_metric(cls, fields: Any) -> Any:
        """Accept `metric = NAME`, which recipes had when there was one metric."""
        if not isinstance(fields, dict) or "metric" not in fields:
            return fields
        if "metrics" in fields:
            raise ValueError("metric and metrics exclude each other: list all in metrics")
        rest = {name: value for name, value in fields.items() if name != "metric"}
        return rest | {"metrics": fields["metric"]}

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Recipe":
        if self.large_batch.epochs == 0 and self.refine.epochs == 0:
            raise ValueError(
                "large_batch.epochs and refine.epochs are both 0: there is nothing to train"
            )
        if self.optimizer.name in ("Rprop", "torch.optim:Rprop"):
            self._check_rates_of_rprop()
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                "deterministic and cudnn_benchmark exclude each other: "
                "an algorithm that is chosen by its speed does not repeat"
            )
        if self.metrics[0].smaller_is_better and self.large_batch.stop_accuracy is not None:
            raise ValueError(
                f"large_batch.stop_accuracy ends a phase at a value from below, and smaller values "
                f"of {self.metrics[0].key} are better: leave it out, or list another metric first"
            )
        if self.large_batch.epochs == 0 and not (self.model.weights or self.model.pretrained):
            raise ValueError(
                "large_batch.epochs = 0 refines a model that exists: "
                "name its file in model.weights, or set model.pretrained"
            )
        return self

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> "Recipe":
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                "label_smoothing applies to cross_entropy only: smooth the labels in your own loss"
            )
        if self.refine.epochs and self.refine.average_every_steps and self.groups == 1:
            raise ValueError(
                "refine.average_every_steps has no effect with groups = 1, whose model is its own "
                "average: set groups to more, or leave it out"
            )
        longest = max(self.large_batch.epochs, self.refine.epochs * self.refine.cycles)
        if self.checkpoint.snapshots > longest:
            raise ValueError(
                f"checkpoint.snapshots = {self.checkpoint.snapshots} has no effect, since no phase "
                f"has more than {count(longest, 'epoch')}: set it lower, or leave it out"
            )
        if self.refine.epochs and self.unused_size:
            raise ValueError(f"{self.unused_size}; leave it out")
        return self

    @property
    def unused_size(self) -> str | None:
        """A step of `data.image_size` that lies behind the run's end, in words; None without one.

        With `refine.epochs = 0` the run may be phase 1 of others, which have that step.
        """
        epochs = self.large_batch.epochs + self.refine.epochs * self.refine.cycles
        last, pixels = (self.data.image_size or ((0, 0),))[-1]
        if last < epochs:
            return None
        return (
            f"data.image_size has {pixels} pixels from epoch {last} on, but the run has "
            f"{count(epochs, 'epoch')}, counted from 0: no image is trained on at that size"
        )

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics in files, the main one first."""
        return [metric.key for metric in self.metrics]

    def _check_rates_of_rprop(self) -> None:
        for name, phase in (("large_batch", self.large_batch), ("refine", self.refine)):
            if phase.epochs and not is_constant(phase.learning_rate):
                raise ValueError(
                    f"{name}.learning_rate changes, but Rprop takes the rate of its first step "
                    "alone: give it a constant"
                )

    def to_toml(self) -> str:
        """Return the complete recipe, with all defaults, as TOML that `load_recipe` reads."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
