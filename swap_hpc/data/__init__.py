"""Data sets, and their batches through DALI. The only package that imports DALI and torchvision's data sets."""

from pathlib import Path

from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Arrays, Batches, Dataset, Files, Graph, with_validation
from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import first_then_rest
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Data

# Data of the user's own, and what lies in their folder.
LOCAL = {
    "folder": "train/<class>/ and test/<class>/ (or set data.test_every, which splits <class>/)",
    "webdataset": "train/*.tar and test/*.tar (swap-hpc pack makes them)",
}

__all__ = ["Arrays", "Batches", "Dataset", "Files", "Graph", "Picks", "download", "load"]


def load(data: Data, team: Team, threads: int) -> Dataset:
    """The data set that a recipe names, on every rank of `team`; one of them downloads what is missing.

    Raises UserError: a folder that is missing, empty, or has other classes in test than in train; a download that
    fails; an image that cannot be read; a validation split that leaves nothing to train on; ranks whose data differ
    (of a user's own `Batches`, whose number or classes do).
    """
    dataset = _loaded(data, team, threads)
    mine = (
        dataset.classes,
        dataset.channels,
        len(dataset.train),
        len(dataset.test),
        dataset.train.contents,
        dataset.test.contents,
    )
    every = team.allgather(mine)
    if other := next((rank for rank, each in enumerate(every) if each != every[0]), None):
        counts = [
            f"{train} training and {test} test images"
            for _, _, train, test, *_ in (every[other], every[0])
        ]
        raise UserError(
            f"rank {other} has other data than rank 0 ({counts[0]}, rank 0 {counts[1]}; in another order, maybe): "
            "give all nodes the same files, and what is random in a function of your own a seed"
        )
    return dataset


def _loaded(data: Data, team: Team, threads: int) -> Dataset:
    from swap_hpc.data import sources

    if ":" in data.name:
        return first_then_rest(
            team, lambda: with_validation(_seeded(data), data.validation)
        )  # it may download
    if not data.test_every:
        first_then_rest(team, lambda: download(data.name, data.path))
    return team.agree(
        lambda: with_validation(sources.SOURCES[data.name](data, threads), data.validation)
    )


def _seeded(data: Data) -> Dataset:
    from swap_hpc.data.own import own

    seed_all(0)  # what it splits or makes by chance is the same on all ranks, and at the next start
    return own(data)


def download(name: str, path: Path) -> str:
    """Makes sure that the data set's files are in `path`, verified, and says where they are. Raises UserError."""
    from swap_hpc.data import sources

    if name in LOCAL and not (path / "train").is_dir():
        raise UserError(f"no folder {path / 'train'}: point --data at a folder with {LOCAL[name]}")
    if name in sources.TORCHVISION and not (path / "train").is_dir():
        sources.torchvision_download(name, path)
    return f"{name}: {path if name in (*sources.TORCHVISION, *LOCAL) else 'comes with the package'}"
