"""The fields of a recipe that describe the model and the data."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat, model_validator

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import (
    Count,
    CountOrZero,
    DataSource,
    Deviations,
    ImageSizes,
    Place,
    Statistics,
    check_finite,
    one_as_several,
)


class Model(Section):
    """The model: the name of its builder and, as further keys, the builder's arguments."""

    model_config = ConfigDict(extra="allow")
    name: str
    """Builder of the model: `resnet9`, `torchvision:NAME`, `timm:NAME` (if timm is installed) or
    `package.module:function`. It is called with the section's further keys as arguments."""
    weights: Place | None = None
    """File with the initial weights, of this or another program: `.safetensors`, or `.pt`, `.pth`
    of `torch.save`, of which nothing is executed. The run says what it took from where. None: the
    builder's own initialisation."""
    weights_entry: str | None = None
    """Entry of the file in `weights` that holds the state dict, as in `state_dict_ema` or
    `state.model`. None: the usual ones, `state_dict`, `model`, ..., or the whole file."""
    weights_except: Annotated[tuple[str, ...], BeforeValidator(one_as_several)] = ()
    """Patterns of names that are not loaded, as in `"head.*"` for a head of another size: in the
    model they stay as initialised, in the file they are not used."""
    pretrained: bool | str | None = None
    """Begin with the package's pretrained weights of a `torchvision:` or `timm:` model: true for
    its usual ones, or their name (`IMAGENET1K_V2` of torchvision, a tag of timm). A head for other
    classes stays as initialised. A function of your own gets it as an argument."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Model":
        check_finite(self.arguments)
        if self.weights_entry and not self.weights:
            raise ValueError("weights_entry is an entry of the file in weights: name that, too")
        if self.weights and self.pretrained:
            raise ValueError("weights and pretrained exclude each other: begin with one of them")
        if self.weights_except and not (self.weights or self.has_library_weights):
            raise ValueError("weights_except leaves out names of weights, or of pretrained ones")
        if self.pretrained and ":" not in self.name:
            raise ValueError(
                f"pretrained is for models of torchvision and timm: {self.name} has no"
                " weights of its own"
            )
        return self

    @property
    def has_library_weights(self) -> bool:
        """Whether the model begins with pretrained weights of torchvision or timm."""
        return bool(self.pretrained) and self.name.startswith(("torchvision:", "timm:"))

    @property
    def arguments(self) -> dict[str, Any]:
        """The builder's arguments: all keys of the section that are not fields."""
        return dict(self.model_extra or {})


class Data(Section):
    """The data set, and how its images are read."""

    name: DataSource
    """Source of the images: a built-in data set (`digits`, `cifar10`, `cifar100`, `synthetic`), a
    `folder` of images, `webdataset` shards, or `package.module:function`."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments of your own function in `name`, which is called with `path` first."""
    path: Place = Path("data")
    """Folder that holds the data or receives the download; the option `--data` sets it."""
    test_every: Annotated[int, Field(ge=2)] | None = None
    """For a `folder` with one subfolder per class and no splits: hold out every N-th image of each
    class (sorted by name) as the test split. None: the folder has `train`, `test`
    and, if you like, `val`."""
    validation: CountOrZero = 0
    """Training samples to set aside as the validation split, always the same ones: epochs are
    evaluated on it and choices are made by it, and the test split is for reports. 0: train on all
    samples; the validation split is the data set's own (the folder `val` beside `test`), if any."""
    image_size: ImageSizes | None = None
    """Side of training images in pixels, or `[epoch, pixels]` pairs, each valid from its epoch of
    the run on; the refinement begins at epoch `large_batch.epochs`, and the last size before the
    run's end. None: the size of the files, which must all have the same one."""
    evaluation_size: Count | None = None
    """Side of evaluated images in pixels, for files that are read in every epoch. None: the last
    `image_size`."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the evaluated centre square as a fraction of the image's shorter side; 1 keeps the
    largest square."""
    memory_gib: NonNegativeFloat = 4.0
    """Memory for decoded image files, in GiB per node, whose ranks share them. A data set that fits
    is decoded once and kept; a larger one, or one with several image sizes, is read in every epoch.
    On each rank decoding uses up to an eighth of it at a time, but at least 96 MiB or one image."""
    mean: Statistics | None = None
    """Mean of each channel, of pixels in [0, 1], subtracted from the images; or `"imagenet"`, which
    torchvision's and most of timm's pretrained models want. None: the training images' own mean
    where they lie in memory, ImageNet's where files are read in every epoch."""
    std: Deviations | None = None
    """Standard deviation of each channel, of pixels in [0, 1], by which the images are divided; or
    `"imagenet"`. None: as for `mean`. A run's first lines say which mean and deviation it uses."""
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
