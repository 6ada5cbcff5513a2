"""What needs a GPU: the same code there gives what it gives on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from launch import swap_hpc

from swap_hpc.averaging import WeightSum, average_weights_
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.devices import Device
from swap_hpc.fit import fit
from swap_hpc.ranks import Team

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]

GPU = Device(torch.device("cuda", 0), shared=False, threads=1)
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
    assert (tmp_path / "out" / "result.json").exists()
