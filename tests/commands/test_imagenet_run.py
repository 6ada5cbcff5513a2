"""The recipe `imagenet`, shortened, from a folder and from its shards.

It runs on a generated set shaped like ImageNet, on 4 ranks as 2 groups of 2.
"""

import json
from pathlib import Path
from typing import Any

import imagenet_like
import pytest
from launch import settings, swap_hpc

SHORT = settings(
    "precision=fp32",
    "model.name=torchvision:resnet18",
    "data.image_size=[[0,32],[1,40]]",
    "large_batch.epochs=2",
    "large_batch.batch_size=240",
    "large_batch.learning_rate=[[0,0.0],[2,0.05]]",
    "refine.epochs=3",
    "refine.batch_size=120",
    "refine.learning_rate=[[0,0.05],[3,0.0]]",
    "evaluate.every=0",
    "evaluate.batch_size=100",
    "batchnorm.samples=256",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet_like.make(tmp_path_factory.mktemp("imagenet") / "folder", train=1)


def lines(out: Path, part: str) -> list[dict[str, Any]]:
    text = (out / "metrics" / f"{part}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_imagenet_from_a_folder_and_from_shards_is_one_run(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    packed = swap_hpc("pack", folder, shards, "--samples-per-shard", "64", ranks=2)
    assert packed.code == 0, packed.stderr
    assert len(list((shards / "train").glob("*.tar"))) == 16
    assert len(list((shards / "train").glob("*.idx"))) == 16
    again = swap_hpc("pack", folder, shards, "--samples-per-shard", "64")
    assert again.code == 0 and "32 shards in" in again.stdout
    results = []
    for kind, path in (("folder", folder), ("webdataset", shards)):
        out = tmp_path / kind
        fields = (*SHORT, *settings(f"data.name={kind}"))
        line = ("train", "imagenet", "--data", str(path), "--out", str(out), *fields)
        done = swap_hpc(*line, ranks=4)
        assert done.code == 0, done.stderr
        assert "imagenet: 4 ranks, 2 groups" in done.stdout
        assert "read and decoded in every epoch" in done.stdout
        large = [line for line in lines(out, "world") if line["phase"] == "large_batch"]
        groups = [lines(out, f"group-{group:03d}") for group in range(2)]
        assert [line["images"] for line in large] == [960, 960]
        assert [[line["images"] for line in group] for group in groups] == [[960] * 3] * 2
        for group in groups:
            assert group[2]["peak_memory_mib"] < 1.1 * group[1]["peak_memory_mib"]
        results.append(json.loads((out / "result.json").read_text()))
    one, other = results
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["test_accuracy"] == other["test_accuracy"]
    assert len(one["test_accuracy"]["groups"]) == 2
