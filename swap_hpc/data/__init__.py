"""Data sets and their batches. The only package that imports DALI and torchvision's data sets."""

from collections.abc import Mapping
from pathlib import Path

from swap_hpc.data.dataset import Dataset, SplitName, with_validation
from swap_hpc.data.normalisation import with_normalisation
from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Arrays, Batches, Files, Graph
from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import first_then_rest
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data

# What a folder of the user's own data must hold, by the name of the data set.
LOCAL = {
    "folder": "train/<class>/ and test/<class>/ (or set data.test_every, which splits <class>/)",
    "webdataset": "train/*.tar and test/*.tar (swap-hpc pack makes them)",
}

__all__ = ["Arrays", "Batches", "Dataset", "Files", "Graph", "Picks", "download", "load"]

# The functions below import DALI, by way of `sources`, only when they need it: a user's data set
# that imports this package must not wait for it.


def load(data: Data, team: Team, threads: int) -> Dataset:
    """Load the data set that a recipe names, on every rank of a team.

    One rank downloads what is missing, while the others wait. Collective over `team`.

    Args:
        data: the recipe's section `[data]`.
        team: the ranks that load it, all of the same data.
        threads: CPU threads that this rank decodes with.

    Returns:
        The data set, with the same samples in the same order on all ranks.

    Raises:
        UserError: a folder is missing, is empty, or has other classes in another split than in
            train; a download fails; an image cannot be read; a validation split leaves nothing to
            train on; the data differ between ranks; `data.mean` has not a number for each channel.
            `Batches` and `Graph` are compared only by the numbers of their samples and by the
            classes. Raised on all ranks.
    """
    dataset = _load_on_each_rank(data, team, threads)
    _check_alike(dataset, team)
    return team.agree(lambda: with_normalisation(dataset, data))


def _load_on_each_rank(data: Data, team: Team, threads: int) -> Dataset:
    if ":" in data.name:
        # one rank first: a user's function may download, too
        return first_then_rest(team, lambda: with_validation(_custom(data), data.validation))

    from swap_hpc.data import sources

    # `download` checks for train/ and test/, which a folder to be split does not have
    if not data.test_every:
        first_then_rest(team, lambda: download(data.name, data.path))
    source = sources.SOURCES[data.name]
    return team.agree(lambda: with_validation(source(data, threads), data.validation))


def _custom(data: Data) -> Dataset:
    from swap_hpc.data.custom import load_custom

    # what the function draws or splits at random is the same on all ranks and in a resumed run
    seed_all(0)
    return load_custom(data)


def _check_alike(dataset: Dataset, team: Team) -> None:
    samples = {name: len(split) for name, split in dataset.splits.items()}
    contents = [split.contents for split in dataset.splits.values()]
    mine = (samples, dataset.classes, dataset.channels, contents)
    first, *others = team.allgather(mine)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise UserError(
                f"rank {rank} has other data than rank 0 ({_counts(other[0])} samples, "
                f"rank 0 has {' and '.join(map(str, first[0].values()))}, maybe in another order): "
                "give all nodes the same files, and seed what is random in your own function"
            )


def _counts(samples: Mapping[SplitName, int]) -> str:
    """Return the sizes of splits: "6 training and 6 test"."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *parts, last = (f"{number} {words[name]}" for name, number in samples.items())
    return f"{', '.join(parts)} and {last}"


def download(name: str, path: Path) -> str:
    """Make sure that a data set's files are in a folder, and verify what was downloaded.

    Args:
        name: the data set.
        path: the folder.

    Returns:
        A line that names the data set and where it is.

    Raises:
        UserError: a folder is missing, or the download fails.
    """
    from swap_hpc.data import sources

    has_train = (path / "train").is_dir()
    if name in LOCAL and not has_train:
        raise UserError(f"no folder {path / 'train'}: point --data at a folder with {LOCAL[name]}")
    if name in sources.TORCHVISION and not has_train:
        sources.torchvision_download(name, path)
    has_files = name in LOCAL or name in sources.TORCHVISION
    return f"{name}: {path if has_files else 'comes with the package'}"
