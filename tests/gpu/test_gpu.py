"""Tests that need a GPU: the package gives the same results there as on the CPU."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from launch import settings, swap_hpc
from nvidia.dali import fn
from PIL import Image
from torch import nn
from torch.nn import functional as F

from swap_hpc.average.agreement import fingerprint
from swap_hpc.average.power import iterate_power_methods_
from swap_hpc.average.state import encoded
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.data import Arrays, Dataset, Files, Graph, loader
from swap_hpc.data.decode import decode
from swap_hpc.data.places import streams_of
from swap_hpc.data.sampling import Key, Picks, epoch_picks, training_picks
from swap_hpc.parallel import gradients
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.horovod import load_horovod
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.run.prepare import choose_algorithms
from swap_hpc.train import precision
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.optimizers import without_guards

NO_GPU = "no GPU is visible: run make test-gpu on a host with one"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]

GPU = Device(torch.device("cuda", 0), threads=1, uuid="the only one", capability=(9, 0))
KEY = Key(5, Phase.LARGE_BATCH)


def test_batches_hold_the_cpus_pixels() -> None:
    job = tiny.job()
    here = job.training_batches(job.recipe.large_batch, KEY, Team.alone())
    there = replace(job, device=GPU).training_batches(job.recipe.large_batch, KEY, Team.alone())
    for (images, labels), (images_gpu, labels_gpu) in zip(here, there, strict=True):
        assert images_gpu.is_cuda and images_gpu.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images_gpu.cpu(), images) and torch.equal(labels_gpu.cpu(), labels)


def test_a_fingerprint_is_the_cpus() -> None:
    tensors = [
        torch.randn(10, 3, 3, 3),
        torch.randn(7, dtype=torch.complex64),
        torch.randn(5).half(),
        torch.randn(3).double(),
        torch.arange(9),
    ]
    assert fingerprint([tensor.cuda() for tensor in tensors]) == fingerprint(tensors)


def test_power_iterations_settle_in_float32() -> None:
    """A refresh of batch norm may run under autocast, whose products are bfloat16 on a GPU."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(30, 20)).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        iterate_power_methods_(layer, set(layer.modules()), Team.alone())
    layer.eval()
    assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 1) < 1e-4


def test_extra_states_do_not_depend_on_their_device() -> None:
    state = OrderedDict(scale=torch.arange(3.0), more=[torch.ones(2), "text"])
    there = OrderedDict(scale=torch.arange(3.0).cuda(), more=[torch.ones(2).cuda(), "text"])
    assert torch.equal(encoded(there), encoded(state))


def test_a_graphs_output_on_the_cpu_arrives_whole() -> None:
    """DALI fills its buffers again while the GPU still has other work to do first."""

    def graph(picks: Iterator[Picks], training: bool) -> tuple[Any, Any]:
        def batch(pick: Picks) -> tuple[np.ndarray, np.ndarray]:
            return np.repeat(pick.indices[:, None], 100_000, 1).astype(np.float32), pick.indices

        return tuple(fn.external_source((batch(pick) for pick in picks), num_outputs=2, batch=True))

    split = Graph(64, graph)
    data = Dataset(split, split, ("a",))
    busy = torch.randn(4096, 4096, device="cuda")
    seen = []
    picks = training_picks(KEY, 64, 16, 0, 1, range(10))
    for inputs, targets in loader.batches(data, split, picks, loader.View(Augment()), 16, GPU):
        busy = busy @ busy / 64  # the copies below are queued behind it
        seen.append((inputs.clone(), targets.clone()))
    assert len(seen) == 40
    for inputs, targets in seen:
        assert torch.equal(inputs, targets[:, None].float().expand_as(inputs))


def test_horovods_kernels_and_nccl_average_as_the_plain_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank that poses as two makes buckets, fusion and scaling kernels and NCCL run.

    Twice, since Horovod is started for phase 1 and again for phase 2.
    """
    if not load_horovod().nccl_built():
        pytest.skip("this Horovod was built without NCCL")
    job = replace(tiny.job(model={"name": "tiny:batch_normed"}), device=GPU)
    together = Team.alone()
    together.size = 2
    weights = []
    for team in (together, together, Team.alone()):
        model = tiny.model(job).cuda()
        sgd = without_guards(torch.optim.SGD)(model.parameters(), lr=0.1)
        averaging = gradients.gradient_averaging(model, team, GPU)
        with use_deterministic_cudnn(), averaging as average_gradients:
            for images, labels in job.training_batches(job.recipe.large_batch, KEY, Team.alone()):
                sgd.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                average_gradients()
                sgd.step()
        weights.append(tiny.weights(model.cpu()))
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[2])


@contextmanager
def use_deterministic_cudnn() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


def test_deterministic_runs_repeat(tmp_path: Path) -> None:
    hashes = []
    quick = settings("large_batch.epochs=2", "refine.epochs=1")
    on_gpu = settings("deterministic=true", "device=cuda")
    for out in (tmp_path / "one", tmp_path / "two"):
        done = swap_hpc("train", "digits", *quick, *on_gpu, "--out", out, ranks=1)
        assert done.code == 0, done.stderr
        hashes.append(json.loads((out / "result.json").read_text())["weights_sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "fields", [{"channels_last": True}, {"cudnn_benchmark": True}, {"optimizer": {"fused": True}}]
)
def test_faster_settings_only_round_differently(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    weights = []
    for more in ({}, fields):
        job = replace(tiny.job(model={"name": "tiny:batch_normed"}, **more), device=GPU)
        choose_algorithms(job.recipe)
        model = job.build()
        list(fit(model, job, PHASE_1, Team.alone()))
        weights.append(tiny.weights(model.cpu()))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-3)


def test_doctor_finds_no_problem_on_ranks_that_share_the_gpu() -> None:
    done = swap_hpc("doctor", ranks=2)
    assert done.code == 0, done.stderr
    line = "a step's gradients, averaged by Horovod over world: right on all ranks"
    assert line in done.stdout, done.stdout


def test_training_gives_the_cpus_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    job = tiny.job()
    here, there = tiny.model(job), tiny.model(job).cuda()
    list(fit(here, job, PHASE_1, Team.alone()))
    list(fit(there, replace(job, device=GPU), PHASE_1, Team.alone()))
    torch.testing.assert_close(tiny.weights(there.cpu()), tiny.weights(here), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_skips_steps_that_overflow_and_trains(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    job = tiny.job(precision="fp16", optimizer={"clip_norm": 1.0, "fused": fused})
    expected, model = tiny.model(job), tiny.model(job).cuda()
    list(fit(expected, job, PHASE_1, Team.alone()))
    events = [*fit(model, replace(job, device=GPU), PHASE_1, Team.alone())]
    updates = [event.updates for event in events if isinstance(event, Epoch)]
    assert updates[0].skipped > 0 and updates[-1].loss_scale
    assert updates[-1].loss_scale == 2.0 ** (22 - sum(each.skipped for each in updates))
    torch.testing.assert_close(
        tiny.weights(model.cpu()), tiny.weights(expected), rtol=5e-2, atol=5e-2
    )


def test_the_average_is_the_cpus_bit_for_bit() -> None:
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
    line = ("train", "digits", *settings("device=cuda"), "--out", str(tmp_path / "out"))
    done = swap_hpc(*line, ranks=ranks)
    assert done.code == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["test_accuracy"]["averaged"] >= 0.975
    memory = result["peak_memory_mib"]
    assert 1 < memory["gpu_allocated"] <= memory["gpu_reserved"] < 20_000
    shared = "ranks share a GPU: gradients go through host memory" in done.stdout
    assert shared == (ranks > torch.cuda.device_count())


def test_batches_that_run_ahead_keep_their_pixels() -> None:
    job = replace(tiny.job(large_batch={"epochs": 40}), device=GPU)
    phase = job.recipe.large_batch
    in_time = sums_in_time(job.training_batches(phase, KEY, Team.alone()))
    assert sums_behind(job.training_batches(phase, KEY, Team.alone())) == in_time


def sums_in_time(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Return the sum of each batch, computed before the next one is asked for."""
    return [images.double().sum().item() for images, _ in batches]


def sums_behind(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Return the sum of each batch, computed while later batches are made.

    A batch is dropped while the GPU still reads it: DALI must not use its memory before.
    """
    busy = torch.randn(4096, 4096, device="cuda")
    sums = []
    for images, _ in batches:
        busy = busy @ busy / 64  # the sum below is queued behind it
        sums.append(images.double().sum())
    return [each.item() for each in sums]


def test_streamed_files_are_decoded_on_the_gpu(tmp_path: Path) -> None:
    paths = []
    for i in range(12):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Image.fromarray(np.full((50 + i, 70 - i, 3), 20 * i, np.uint8)).save(paths[-1], quality=95)
    split = Files(tuple(paths), np.arange(12))
    data = Dataset(split, split, tuple("abcdefghijkl"), (32, 32), 3, (0.0,) * 3, (1.0,) * 3)
    for augment, pick in (
        (None, Picks(np.arange(12), None)),
        (Augment(flip=True, crop_area=(0.08, 1.0)), epoch_picks(KEY, 0, 12)),
    ):
        view = loader.View(augment)
        ((images, labels),) = loader.batches(data, split, iter([pick]), view, 12, GPU)
        assert images.shape == (12, 3, 32, 32) and labels.tolist() == pick.indices.tolist()
        np.testing.assert_allclose(images.mean((1, 2, 3)).cpu(), 20 * pick.indices, atol=2)


JITTER: dict[str, Any] = {"brightness": 0.3, "contrast": 0.3, "hue": 0.1}
ALL: dict[str, Any] = {"flip": True, "cutout": 5, "erasing": 0.5, **JITTER}
AUGMENTS = [
    Augment(pad=3, randaugment=2, mixup=0.4, **ALL),
    Augment(crop_area=(0.3, 1.0), trivial_augment=True, cutmix=1.0, **ALL),
    Augment(crop_area=(0.3, 1.0), flip=True),
    Augment(erasing=1.0, mixup=0.4, cutmix=1.0),
]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_augmented_images_are_nearly_the_cpus(augment: Augment, kind: str, tmp_path: Path) -> None:
    """Few pixels differ by more than rounding: some operations make much of one level."""
    data = coloured(tmp_path, 32)
    if kind == "memory":
        assert isinstance(data.train, Files)
        data = replace(data, train=Arrays(decode(data.train, (42, 42), 1), data.train.labels))
    pick = epoch_picks(KEY, 0, 32, streams_of(augment))
    view = loader.View(augment)
    ((here, targets),) = loader.batches(data, data.train, iter([pick]), view, 32, tiny.CPU)
    ((there, their_targets),) = loader.batches(data, data.train, iter([pick]), view, 32, GPU)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(their_targets.cpu(), targets)
    off = (there.cpu() - here).abs()  # of 255 levels
    assert (off > 12).float().mean() < 0.02 and off.median() <= 1, (off.mean(), off.max())


def coloured(folder: Path, number: int) -> Dataset:
    """Return JPEG files of coarse colours, which are stored at half the resolution."""
    generator, paths = np.random.default_rng(0), []
    for i in range(number):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = coarse.resize((64, 48), Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{i}.jpg"))
        image.save(paths[-1], quality=95, subsampling="4:2:0")
    split = Files(tuple(paths), np.arange(number))
    classes = tuple(map(str, range(number)))
    return Dataset(split, split, classes, (42, 42), 3, (0.0,) * 3, (1.0,) * 3)


def test_streamed_colours_are_nearly_the_cpus(tmp_path: Path) -> None:
    data = coloured(tmp_path, 8)
    picks = [Picks(np.arange(8), None)]
    ((here, _),) = loader.batches(data, data.test, iter(picks), loader.View(None), 8, tiny.CPU)
    ((there, _),) = loader.batches(data, data.test, iter(picks), loader.View(None), 8, GPU)
    off = (there.cpu() - here).abs()  # of 255 levels
    assert off.mean() < 1 and off.max() < 12, (off.mean(), off.max())


def test_streamed_batches_that_run_ahead_keep_their_pixels(tmp_path: Path) -> None:
    data = coloured(tmp_path, 8)
    picks = [Picks(np.arange(i, i + 4), None) for i in range(5)] * 20
    view = loader.View(None)
    in_time = sums_in_time(loader.batches(data, data.test, iter(picks), view, 4, GPU))
    assert sums_behind(loader.batches(data, data.test, iter(picks), view, 4, GPU)) == in_time
