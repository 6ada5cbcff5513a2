"""Runs that begin with the weights of another program."""

import json
import shutil
import sys
from pathlib import Path

import torch
import torchvision
from launch import command, settings, swap_hpc

from swap_hpc.recipe.inputs import Model
from swap_hpc.train import models

FAULTS = str(Path(__file__).parents[1] / "faults.py")
QUICK = settings("large_batch.epochs=2", "refine.epochs=1", "model.width=2")
HEAD = "model.weights_except=['linear.*']"


def foreign(path: Path) -> Path:
    """Write weights for 100 classes as a program would that trains with DistributedDataParallel."""
    recipe = Model.model_validate({"name": "resnet9", "width": 2})
    state = models.build(recipe, classes=100, channels=1, seed=7).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, path)
    return path


def test_a_run_goes_on_without_the_file_that_it_began_with(tmp_path: Path) -> None:
    file = foreign(tmp_path / "their.pth")
    begin = settings(f"model.weights={file}", HEAD, "large_batch.epochs=0")
    line = ("train", "digits", *QUICK, *begin, "--out")
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = swap_hpc(*line, whole, ranks=2)
    assert done.code == 0, done.stderr
    for note in (
        f"{file}: the weights in its entry state_dict",
        f"{file}: the prefix module. removed from names",
        f"{file}: linear.weight not loaded, left as initialised",
    ):
        assert note in done.stdout.splitlines()

    # the other group of this rank has not begun: it begins with the weights, too
    fault = {"kind": "sigterm", "place": "refine", "rank": 1, "step": "group 2, epoch 1, step 3"}
    program = (sys.executable, FAULTS, json.dumps(fault | {"mark": str(tmp_path / "mark")}))
    done = command(*program, *line, out, ranks=2)
    assert done.code == 75, done.stderr
    file.unlink()
    done = swap_hpc(*line, out, ranks=2)
    assert done.code == 0, done.stderr
    assert hash_of(out) == hash_of(whole)


def hash_of(run: Path) -> str:
    return json.loads((run / "result.json").read_text())["weights_sha256"]


def test_weights_that_do_not_fit_leave_no_run_behind(tmp_path: Path) -> None:
    file = foreign(tmp_path / "their.pth")
    begin = settings(f"model.weights={file}")
    done = swap_hpc("train", "digits", *QUICK, *begin, "--out", tmp_path / "out", ranks=2)
    assert done.code == 2
    assert done.ours == [
        f"swap-hpc: the weights {file} do not fit this model: linear.weight is (100, 16) in them "
        "and (10, 16) in the model; --set 'model.weights_except=[\"linear.*\"]' leaves that out: "
        "the model's own stay as initialised"
    ]
    assert not (tmp_path / "out" / "recipe.toml").exists()


def test_pretrained_weights_are_needed_once(tmp_path: Path) -> None:
    """The dry step and phase 2 build the model again, and a run goes on, without them."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.manual_seed(5)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), cache / Path(weights.url).name)
    no_network = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    source = "torchvision:shufflenet_v2_x0_5 (IMAGENET1K_V1)"
    fields = (
        *('model={name="torchvision:shufflenet_v2_x0_5", pretrained=true}', "data.name=synthetic"),
        *("data.samples=512", "batchnorm.samples=256", "refine.batch_size=128", "groups=2"),
        *("large_batch.epochs=2", "refine.epochs=1", "checkpoint.min_seconds=0"),
    )
    line = ("train", "digits", *settings(*fields), "--out")
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = swap_hpc(*line, whole, ranks=2, variables=no_network)
    assert done.code == 0, done.stderr
    told = done.stdout.splitlines()
    assert f"{source}: pretrained weights" in told
    assert f"{source}: fc.weight, fc.bias not loaded, left as initialised" in told

    fault = {"kind": "sigterm", "place": "large_batch", "rank": 1, "step": "epoch 2, step 1"}
    program = (sys.executable, FAULTS, json.dumps(fault | {"mark": str(tmp_path / "mark")}))
    done = command(*program, *line, out, ranks=2, variables=no_network)
    assert done.code == 75, done.stderr
    shutil.rmtree(cache)
    done = swap_hpc(*line, out, ranks=2, variables=no_network)
    assert done.code == 0, done.stderr
    assert hash_of(out) == hash_of(whole)
