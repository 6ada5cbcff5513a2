"""Whether the labels of images in memory or in files are what the loss takes."""

from collections.abc import Sequence

import numpy as np

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.splits import Batches
from swap_hpc.errors import UserError
from swap_hpc.recipe.wording import first_few


def check_labels(name: str, dataset: Dataset, loss: str) -> None:
    """Check the labels of all splits, for the loss `cross_entropy`.

    Args:
        name: the data set's.
        dataset: the data set; what its own `Batches` make is not known.
        loss: the loss that the recipe names.

    Raises:
        UserError: a label is not the number of a class.
    """
    if loss != "cross_entropy":
        return
    for key, split in dataset.splits.items():
        if not isinstance(split, Batches):
            _check(f"the {key} split of {name}", split.labels, dataset.classes)


def _check(whose: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    are_shares = labels.dtype.kind == "f" and labels.shape[1:] == (len(classes),)
    if are_shares:
        return
    if labels.dtype.kind == "f":
        raise UserError(
            f"{whose} has targets {list(labels.shape)} {labels.dtype}, and cross_entropy takes "
            'class numbers: name a loss of your own (loss = "package.module:function")'
        )
    largest, smallest = int(labels.max()), int(labels.min())
    # torch's cross-entropy leaves -100 out, as masks have it
    if largest >= len(classes) or (smallest < 0 and smallest != -100):
        wrong = largest if largest >= len(classes) else smallest
        names = first_few(tuple(map(str, classes))) or "none"
        raise UserError(
            f"{whose} has the label {wrong} beside {len(classes)} classes ({names}), whose numbers "
            "begin at 0"
        )
