"""What needs a GPU: the same code there gives what it gives on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from launch import swap_hpc
from PIL import Image

from swap_hpc.averaging import WeightSum, average_weights_
from swap_hpc.data import Dataset, Files, loader
from swap_hpc.data.sampling import Key, Phase, Picks, epoch_picks
from swap_hpc.devices import Device
from swap_hpc.fit import fit
from swap_hpc.ranks import Team
from swap_hpc.recipe import Augment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be seen: make test-gpu on a host with one"),
]

GPU = Device(torch.device("cuda", 0), threads=1, uuid="the only one")
KEY = Key(5, Phase.LARGE_BATCH)


def test_batches_hold_the_cpus_pixels() -> None:
    job = tiny.job()
    here = job.training_batches(job.recipe.large_batch, KEY, Team.alone())
    there = replace(job, device=GPU).training_batches(job.recipe.large_batch, KEY, Team.alone())
    for (images, labels), (images_gpu, labels_gpu) in zip(here, there, strict=True):
        assert images_gpu.is_cuda and images_gpu.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images_gpu.cpu(), images, rtol=1e-4, atol=1e-4)
        assert torch.equal(labels_gpu.cpu(), labels)


def test_training_gives_the_cpus_weights() -> None:
    job = tiny.job()
    here, there = tiny.model(job), tiny.model(job).cuda()
    list(fit(here, job, job.recipe.large_batch, KEY, Team.alone()))
    list(fit(there, replace(job, device=GPU), job.recipe.large_batch, KEY, Team.alone()))
    torch.testing.assert_close(tiny.weights(there.cpu()), tiny.weights(here), rtol=1e-2, atol=1e-3)


def test_the_average_is_the_cpus_to_the_bit() -> None:
    models = [tiny.model(tiny.job(seed=seed)) for seed in range(3)]
    results = []
    for device in ("cpu", "cuda"):
        total = WeightSum()
        for model in models:
            total.add_(model.to(device))
        average_weights_(models[0], Team.alone(), total)
        results.append(tiny.weights(models[0].cpu()))
        models[0] = tiny.model(tiny.job(seed=0))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_digits_with_ranks_that_share_the_gpu(ranks: int, tmp_path: Path) -> None:
    done = swap_hpc("train", "digits", "--set", "device=cuda", "--out", tmp_path / "out", ranks=ranks)
    assert done.code == 0, done.stderr
    accuracy = json.loads((tmp_path / "out" / "result.json").read_text())["test_accuracy"]
    assert accuracy["averaged"] >= 0.975
    assert ("ranks share a GPU: gradients go through host memory" in done.stdout) == (ranks > torch.cuda.device_count())


def test_batches_that_run_ahead_keep_their_pixels() -> None:
    """Batches dropped while the GPU still reads them: DALI must not use their memory before."""
    job = replace(tiny.job(large_batch={"epochs": 40}), device=GPU)
    waited = [images.double().sum().item() for images, _ in job.training_batches(job.recipe.large_batch, KEY, Team.alone())]
    busy = torch.randn(4096, 4096, device="cuda")
    sums = []
    for images, _ in job.training_batches(job.recipe.large_batch, KEY, Team.alone()):
        busy = busy @ busy / 64  # the sum below is queued behind it
        sums.append(images.double().sum())
    assert [s.item() for s in sums] == waited


def test_streamed_files_are_decoded_on_the_gpu(tmp_path: Path) -> None:
    paths = []
    for i in range(12):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Image.fromarray(np.full((50 + i, 70 - i, 3), 20 * i, np.uint8)).save(paths[-1], quality=95)
    split = Files(tuple(paths), np.arange(12))
    data = Dataset(split, split, tuple("abcdefghijkl"), (32, 32), 3, (0.0,) * 3, (1.0,) * 3)
    for augment, pick in ((None, Picks(np.arange(12), None)), (Augment(flip=True), epoch_picks(KEY, 0, 12))):
        ((images, labels),) = loader.batches(data, split, iter([pick]), loader.View(augment), 12, GPU)
        assert images.shape == (12, 3, 32, 32) and labels.tolist() == pick.indices.tolist()
        np.testing.assert_allclose(images.mean((1, 2, 3)).cpu(), 20 * pick.indices, atol=2)
