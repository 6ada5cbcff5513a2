"""No line of a run mixes devices: training, resume, average, evaluation and figures on a stand-in for a GPU."""

import sys
from pathlib import Path

import pytest
from launch import Finished, command

PROGRAM = Path(__file__).parents[1] / "gpu_stand_in.py"
NARROW = "model.width=4"


def run(out: Path, *fields: str, ranks: int | None = None) -> Finished:
    return command(sys.executable, PROGRAM, out, *fields, ranks=ranks, timeout=300)


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (None, (NARROW,)),
        (2, (NARROW, "augment.flip=true", "augment.cutout=3")),
        (
            2,
            (NARROW, "groups=1", "large_batch.accumulate=2", "refine.cycles=2"),
        ),  # gradients go through Horovod and host memory
        (
            None,
            (NARROW, "channels_last=true", "optimizer.name=lars", "refine.average_every_steps=7"),
        ),
    ],
)
def test_a_whole_run_mixes_no_devices(
    ranks: int | None, fields: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(tmp_path, *fields, ranks=ranks)
    assert done.code == 0, done.stderr[-3000:]
    said = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert (
        "stopped" in said
        and said["went on"] == said["train"] == said["average"] == said["evaluate"]
        and len(said["train"]) == 64
    )
    if ranks is None and "refine.average_every_steps=7" not in fields:
        assert said["landscape"] == said["trajectory"] == "True"


def test_a_model_that_mixes_devices_is_refused(tmp_path: Path) -> None:
    """So the run above would have failed, had a line of ours done the same."""
    done = run(tmp_path, "model.name=gpu_stand_in:Mixed")
    assert (
        done.code == 1
        and "fails in its first step" in done.stderr
        and "mixes devices: [(256, 10)] on the GPU, [(10,)] on the CPU" in done.stderr
    )


REFUSED = """
import torch
from gpu_stand_in import OnGpu, StandIn, pretend

pretend()
there, here = OnGpu(torch.ones(3)), torch.ones(3)
with StandIn():
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2] and (there + 1).device.type == "cuda"  # a number may lie on the CPU
    here.copy_(there * 5)
    mixed = [
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there.sum(), here.sum()]),
        lambda: there[torch.tensor([0])],
    ]
    for each in mixed:
        try:
            print(each())
        except RuntimeError as error:
            assert "mixes devices" in str(error), error
assert here.tolist() == [5, 5, 5]
"""


def test_what_a_gpu_refuses_is_refused() -> None:
    done = command(sys.executable, "-c", REFUSED, variables={"PYTHONPATH": str(PROGRAM.parent)})
    assert (done.code, done.stdout) == (0, ""), done.stderr
