"""A user's code draws the same from the global generators in every run, also in a resumed one."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiny
import torch
from torch import Tensor

from swap_hpc.average.agreement import weights_sha256
from swap_hpc.data import loader
from swap_hpc.data.dataset import Dataset
from swap_hpc.data.loader import View
from swap_hpc.data.sampling import Key, Picks, training_picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Batches
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.train.fit import fit


def test_all_generators_are_seeded() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    for seed in (0, 2**32 + 1, 2**64 - 1):
        seed_all(seed)
        drawn = draw()
        draw()
        seed_all(seed)
        assert draw() == drawn
        torch.manual_seed(seed)
        assert torch.rand(()).item() == drawn[0]


def test_a_loss_that_draws_is_the_same_in_two_runs() -> None:
    def trained() -> str:
        job = tiny.job(loss="zoo:mixing_loss")
        model = tiny.model(job)
        random.seed(), np.random.seed()
        for _ in fit(model, job, PHASE_1, Team.alone()):
            pass
        return weights_sha256(model)

    assert trained() == trained()


def noisy(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Tensor, Tensor]]:
    for pick in picks:
        noise = np.random.rand(len(pick.indices)) + random.random() + torch.rand(()).item()
        yield torch.from_numpy(noise), torch.from_numpy(pick.indices)


def ahead(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Ask for the picks in another thread."""
    with ThreadPoolExecutor(1) as pool:
        while pick := pool.submit(next, picks, None).result():
            indices = torch.from_numpy(pick.indices)
            yield indices, indices


def test_another_thread_leaves_the_models_generators_alone() -> None:
    split = Batches(40, ahead)
    data = Dataset(split, split, ("a", "b"))
    picks = training_picks(Key(3, Phase.REFINE, 1), 40, 10, 0, 1, range(2))
    found = loader.batches(data, split, picks, View(None), 10, tiny.CPU)
    seed_all(1)
    expected = [torch.rand(()).item() for _ in range(8)]
    seed_all(1)
    assert [torch.rand(()).item() for _ in found] == expected


def test_data_that_draw_are_the_same_from_any_step() -> None:
    split = Batches(40, noisy)
    data = Dataset(split, split, ("a", "b"))

    def batches(first_step: int) -> list[Tensor]:
        # from the system's entropy: nothing may depend on the state before
        random.seed(), np.random.seed(), torch.seed()
        picks = training_picks(Key(3, Phase.REFINE, 1), 40, 10, 0, 1, range(2), first_step)
        found = loader.batches(data, split, picks, View(None), 10, tiny.CPU)
        return [inputs for inputs, _ in found]

    whole, rest = batches(0), batches(3)
    assert len(whole) == 8 and len(rest) == 5
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0], whole[1])
