"""Mixup and CutMix against numpy, on fixed draws."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import beta  # type: ignore[import-untyped]
from torch.nn import functional as F

from swap_hpc.data import loader
from swap_hpc.data.fields import check_fields
from swap_hpc.data.mixing import Mixtures
from swap_hpc.data.places import streams_of
from swap_hpc.data.sampling import Key, Picks, epoch_picks
from swap_hpc.data.splits import Arrays
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data
from swap_hpc.recipe.phase import Phase
from swap_hpc.run.checks import check_ranks
from swap_hpc.run.prepare import prepare
from swap_hpc.train.metrics import ACCURACY, TOP5


def test_labels_beyond_the_classes_are_refused() -> None:
    data = tiny.dataset()
    fewer = replace(data, classes=data.classes[:-1])
    check_fields(Data(name="a:b"), Augment(), fewer)
    with pytest.raises(UserError, match="a:b has the label 2 beside these classes: "):
        check_fields(Data(name="a:b"), Augment(mixup=0.2), fewer)


BOTH = {"mixup": 0.4, "cutmix": 1.0}


def pick(augment: Augment, samples: int) -> Picks:
    return epoch_picks(Key(0, Phase.REFINE), 0, samples, streams_of(augment))


def batch(augment: Augment, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, H, W, C) and targets."""
    data = tiny.dataset()
    picks = iter([pick(augment, samples)])
    ((images, targets),) = loader.batches(
        data, data.train, picks, loader.View(augment), samples, tiny.CPU
    )
    assert images.is_contiguous(memory_format=torch.channels_last)
    return images.permute(0, 2, 3, 1).numpy(), targets.numpy()


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 1.0}, BOTH], ids=str)
def test_pairs_are_mixed_as_defined(fields: dict[str, float]) -> None:
    """Exactly in the boxes, and to float32's rounding elsewhere."""
    augment = Augment.model_validate({"flip": True, "pad": 1, **fields})
    plain, labels = batch(Augment(flip=True, pad=1), 100)
    images, targets = batch(augment, 100)
    draws = pick(augment, 100).more["mix"]
    one_hot = np.eye(3)[labels]
    cut = 0
    for a in range(0, 100, 2):
        choice, u, x, y = draws[a].astype(float)
        is_cut = "mixup" not in fields or ("cutmix" in fields and choice < 0.5)
        alpha = fields["cutmix" if is_cut else "mixup"]
        share = beta(alpha, alpha).ppf(u)
        for own, other in ((a, a + 1), (a + 1, a)):
            if is_cut:
                half = int(4 * np.sqrt(1 - share))
                columns = slice(max(int(8 * x) - half, 0), min(int(8 * x) + half, 8))
                rows = slice(max(int(8 * y) - half, 0), min(int(8 * y) + half, 8))
                expected = plain[own].copy()
                expected[rows, columns] = plain[other][rows, columns]
                area = (expected[rows, columns].size) / expected.size
                wanted = (1 - area) * one_hot[own] + area * one_hot[other]
                np.testing.assert_array_equal(images[own], expected)
                cut += area > 0
            else:
                expected = share * plain[own] + (1 - share) * plain[other]
                wanted = share * one_hot[own] + (1 - share) * one_hot[other]
                np.testing.assert_allclose(images[own], expected, atol=2e-6)
            np.testing.assert_allclose(targets[own], wanted, atol=1e-6)
    assert targets.dtype == np.float32 and targets.shape == (100, 3)
    assert (cut > 10) == ("cutmix" in fields)


def test_shares_have_the_beta_distribution_and_both_kinds_their_share() -> None:
    augment = Augment(mixup=0.3, cutmix=1.0, cutmix_share=0.2)
    found = Mixtures.drawn(pick(augment, 20_000), augment, (32, 32))
    blended = found.blend < 1
    assert blended.mean() == pytest.approx(0.8, abs=0.02)
    assert not found.boxes[blended].any()
    shares = found.blend[blended]
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.01)


def test_the_mixtures_are_drawn_apart_from_all_else() -> None:
    """So the crops of a run do not change when mixup is added."""
    mixed, plain = pick(Augment(mixup=1.0), 40), pick(Augment(), 40)
    assert np.array_equal(mixed.indices, plain.indices)
    assert mixed.draws is not None and np.array_equal(mixed.draws, plain.draws)  # type: ignore[arg-type]
    assert not plain.more


def test_the_score_compares_with_the_larger_share() -> None:
    outputs = -(torch.arange(3)[:, None] - torch.arange(6)).abs() - 0.01 * torch.arange(6)
    targets = 0.7 * F.one_hot(torch.tensor([0, 2, 2]), 6) + 0.3 * F.one_hot(torch.tensor(1), 6)
    assert ACCURACY(outputs, targets) == pytest.approx(2 / 3)
    assert TOP5(outputs, targets) == 1


@pytest.mark.parametrize(("ranks", "even"), [(1, 24), (2, 24), (4, 24), (8, 32)])
def test_a_share_that_is_odd_is_refused(ranks: int, even: int) -> None:
    recipe = tiny.recipe(augment=BOTH, refine={"epochs": 0, "batch_size": 16})
    if even == 24:
        check_ranks(recipe, ranks)
        return
    message = (
        "large_batch.batch_size = 24: augment.mixup and augment.cutmix mix pairs of images, and "
        "each of 8 ranks would hold 3: --set large_batch.batch_size=32"
    )
    with pytest.raises(UserError, match=message):
        check_ranks(recipe, ranks)


def test_an_odd_batch_of_batch_norm_is_refused() -> None:
    recipe = tiny.recipe(
        model={"name": "tiny:normed"},
        augment={"cutout": 0, **BOTH},
        batchnorm={"batch_size": 21},
    )
    with pytest.raises(UserError, match="batchnorm.batch_size = 21 is odd, and augment.mixup and"):
        prepare(recipe, Team.alone(), Team.alone())


def test_targets_that_are_no_classes_are_refused() -> None:
    from swap_hpc.data.fields import check_fields

    data = tiny.dataset()
    assert isinstance(data.train, Arrays)
    masks = replace(data, train=Arrays(data.train.images, data.train.labels[:, None]))
    recipe = tiny.recipe(augment=BOTH)
    with pytest.raises(UserError, match="mix class numbers, and the targets of synthetic are some"):
        check_fields(recipe.data, recipe.augment, masks)
