"""Data sets and their batches. The only package that imports DALI and torchvision's data sets."""

from collections.abc import Mapping
from pathlib import Path

from swap_hpc.data.dataset import Dataset, SplitName, with_validation
from swap_hpc.data.normalisation import with_normalisation
from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Arrays, Batches, Files, Graph
from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import first_then_rest, node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Data

__all__ = ["Arrays", "Batches", "Dataset", "Files", "Graph", "Picks", "download", "load"]

# The functions below import DALI, by way of `sources`, only when they need it: a user's data set
# that imports this package must not wait for it.


def load(data: Data, team: Team, threads: int, pad: int = 0) -> Dataset:
    """Load the data set that a recipe names, on every rank of a team.

    One rank downloads what is missing, while the others wait. The ranks of a node decode a part of
    the images each, and hold one copy of them together, read-only. Collective over `team`.

    Args:
        data: the recipe's section `[data]`.
        team: the ranks that load it, all of the same data.
        threads: CPU threads that this rank decodes with.
        pad: by which the training images will be padded on the host; where they are shared, they
            are padded once.

    Returns:
        The data set, with the same samples in the same order on all ranks.

    Raises:
        UserError: a folder is missing, is empty, or has other classes in another split than in
            train; a download fails; an image cannot be read; a validation split leaves nothing to
            train on; the data differ between ranks; `data.mean` has not a number for each channel.
            `Batches` and `Graph` are compared only by the numbers of their samples and by the
            classes. Raised on all ranks.
    """
    with node_of(team) as node:
        source = _from_own_function if ":" in data.name else _from_known_source
        dataset = source(data, team, node, threads, pad)
    return team.agree(lambda: with_normalisation(dataset, data))


def _from_own_function(data: Data, team: Team, node: Team, threads: int, pad: int) -> Dataset:
    """Call the user's function on every rank: it may set up more than it returns."""
    from swap_hpc.data.one_copy import shared

    # one rank first: the function may download, too
    dataset = first_then_rest(team, lambda: with_validation(_custom(data), data.validation))
    _check_alike(dataset, team)
    return team.agree(lambda: shared(dataset, node, pad))


def _from_known_source(data: Data, team: Team, node: Team, threads: int, pad: int) -> Dataset:
    from swap_hpc.data import decoded, one_copy, sources

    # `download` checks for train/ and test/, which a folder to be split does not have
    if not data.test_every:
        first_then_rest(team, lambda: download(data.name, data.path))

    def source() -> Dataset:
        return sources.SOURCES[data.name](data)

    def made() -> Dataset:
        return with_validation(source(), data.validation)

    if team.any(sources.are_files(data)):
        found = team.agree(source)
        _check_alike(found, team)  # else ranks could disagree on what they decode together
        dataset = team.agree(lambda: decoded.from_files(found, data, node, threads, pad))
    else:
        dataset = team.agree(lambda: one_copy.made_once(made, node, pad))
    _check_alike(dataset, team)
    return dataset


def _custom(data: Data) -> Dataset:
    from swap_hpc.data.custom import load_custom

    # what the function draws or splits at random is the same on all ranks and in a resumed run
    seed_all(0)
    return load_custom(data)


def _check_alike(dataset: Dataset, team: Team) -> None:
    samples = {name: len(split) for name, split in dataset.splits.items()}
    contents = [split.contents for split in dataset.splits.values()]
    mine = (samples, dataset.classes, dataset.channels, contents)
    rank = team.first_unlike(repr(mine).encode())
    if rank is None:
        return
    first, other = team.broadcast(samples), team.broadcast(samples, rank)
    raise UserError(
        f"rank {rank} has other data than rank 0 ({_counts(other)} samples, "
        f"rank 0 has {' and '.join(map(str, first.values()))}, maybe in another order): "
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
    if name in sources.LOCAL and not has_train:
        raise UserError(
            f"no folder {path / 'train'}: point --data at a folder with {sources.LOCAL[name]}"
        )
    if name in sources.TORCHVISION and not has_train:
        sources.torchvision_download(name, path)
    has_files = name in sources.LOCAL or name in sources.TORCHVISION
    return f"{name}: {path if has_files else 'comes with the package'}"
