"""The samples of a step are a pure function of the key, the epoch and the step."""

import threading
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from swap_hpc.data import sampling
from swap_hpc.data.sampling import (
    Key,
    batchnorm_picks,
    epoch_picks,
    evaluation_picks,
    training_picks,
)
from swap_hpc.recipe.phase import Phase

KEY = Key(seed=0, phase=Phase.REFINE, group=1)


def steps(
    rank: int, size: int, epochs: range = range(3), first_step: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the indices and draws of a rank's steps over 103 samples in batches of 24."""
    picks = training_picks(KEY, 103, 24, rank, size, epochs, first_step)
    return [(pick.indices, pick.draws) for pick in picks if pick.draws is not None]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_share_the_samples_of_one_rank(size: int) -> None:
    ranks = [steps(rank, size) for rank in range(size)]
    for (indices, draws), *shares in zip(steps(0, 1), *ranks, strict=True):
        joined_indices = np.concatenate([share[0] for share in shares])
        joined_draws = np.concatenate([share[1] for share in shares])
        np.testing.assert_array_equal(joined_indices, indices)
        np.testing.assert_array_equal(joined_draws, draws)


def test_an_epoch_visits_each_sample_at_most_once_and_drops_the_rest() -> None:
    all_steps = steps(0, 1)
    assert len(all_steps) == 3 * (103 // 24)
    for epoch in range(3):
        indices = np.concatenate([i for i, _ in all_steps[4 * epoch : 4 * epoch + 4]])
        assert len(np.unique(indices)) == 96
        assert indices.min() >= 0 and indices.max() < 103


def test_starting_inside_the_phase_gives_the_same_rest() -> None:
    rest = steps(0, 1, epochs=range(1, 3), first_step=2)
    for (indices, draws), (i, d) in zip(rest, steps(0, 1)[6:], strict=True):
        np.testing.assert_array_equal(indices, i)
        np.testing.assert_array_equal(draws, d)


def test_a_samples_augmentation_belongs_to_the_sample() -> None:
    """Whatever batch a sample falls into, its draws in an epoch are the same."""
    whole = epoch_picks(KEY, 0, 103)
    assert whole.draws is not None
    by_sample = dict(zip(whole.indices.tolist(), whole.draws.tolist(), strict=True))
    for batch_size in (10, 24, 50):
        for pick in training_picks(KEY, 103, batch_size, 0, 1, range(1)):
            assert pick.draws is not None
            for sample, draws in zip(pick.indices.tolist(), pick.draws.tolist(), strict=True):
                assert by_sample[sample] == draws


KEYS = [
    KEY,
    Key(1, Phase.REFINE, 1),
    Key(0, Phase.LARGE_BATCH, 1),
    Key(0, Phase.REFINE, 2),
    Key(0, Phase.AVERAGE, 1),
]


def test_seed_phase_group_and_epoch_each_change_the_order() -> None:
    orders = [tuple(epoch_picks(key, epoch, 50).indices) for key in KEYS for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)


def test_draws_are_uniform() -> None:
    draws = epoch_picks(KEY, 0, 20_000).draws
    assert draws is not None and draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(draws.shape[1]), atol=0.03)


def test_torch_is_seeded_by_step_and_rank() -> None:
    seeds = [key.torch_seed(step, rank) for key in KEYS for step in range(4) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert KEY.torch_seed(3, 1) == Key(0, Phase.REFINE, 1).torch_seed(3, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 9, 10, 11, 101])
def test_evaluation_visits_each_sample_exactly_once(samples: int, size: int) -> None:
    seen: list[int] = []
    for rank in range(size):
        for pick in evaluation_picks(samples, 10, rank, size):
            seen += pick.indices.tolist()
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batchnorm_passes_whole_batches_of_distinct_samples(size: int) -> None:
    batches: list[list[int]] = []
    for rank in range(size):
        picks = batchnorm_picks(0, samples=100, use=95, batch_size=30, rank=rank, size=size)
        batches += [pick.indices.tolist() for pick in picks]
    assert [len(batch) for batch in batches] == [30, 30, 30]
    assert len(set().union(*batches)) == 90


def test_a_stream_that_is_given_up_does_not_wait_for_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The garbage collector may give it up while it holds locks that such a wait needs."""
    ended = threading.Event()
    first = sampling.Epoch.drawn(KEY, 0, 20)

    def drawn(key: Key, epoch: int, *others: Any) -> sampling.Epoch:
        if epoch:
            ended.wait(60)
        return first

    monkeypatch.setattr(sampling.Epoch, "drawn", drawn)
    picks = training_picks(KEY, 20, 10, 0, 1, range(3))
    next(picks)
    begin = perf_counter()
    picks.close()  # type: ignore[attr-defined]
    ended.set()
    assert perf_counter() - begin < 30
