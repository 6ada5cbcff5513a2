"""No command mixes devices: training, resuming, averages and figures on a stand-in for a GPU."""

import sys
from pathlib import Path

import pytest
from launch import Finished, command

PROGRAM = Path(__file__).parents[1] / "gpu_stand_in.py"


def run(out: Path, *fields: str, ranks: int | None = None) -> Finished:
    return command(sys.executable, PROGRAM, out, *fields, ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (None, ()),
        (2, ("augment.flip=true", "augment.cutout=3")),
        # Gradients go through Horovod and host memory.
        (2, ("groups=1", "large_batch.accumulate=2", "refine.cycles=2")),
        (None, ("channels_last=true", "optimizer.name=lars", "refine.average_every_steps=7")),
    ],
)
def test_a_whole_run_mixes_no_devices(
    ranks: int | None, fields: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(tmp_path, "model.width=4", *fields, ranks=ranks)
    assert done.code == 0, done.stderr[-3000:]
    printed = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert "stopped" in printed
    hashes = {printed[name] for name in ("train", "resumed", "average", "evaluate")}
    assert [len(each) for each in hashes] == [64]
    if ranks is None and "refine.average_every_steps=7" not in fields:
        assert printed["landscape"] == printed["trajectory"] == "True"


def test_a_model_that_mixes_devices_is_refused(tmp_path: Path) -> None:
    """The runs above would have failed in the same way, had a line of the package mixed devices."""
    done = run(tmp_path, "model.name=gpu_stand_in:Mixed")
    assert done.code == 1 and "fails in its first step" in done.stderr
    assert "mixes devices: [(256, 10)] on the GPU, [(10,)] on the CPU" in done.stderr


REFUSED = """
import torch
from gpu_stand_in import OnGpu, StandIn, pretend

pretend()
there, here = OnGpu(torch.ones(3)), torch.ones(3)
with StandIn():
    # A single number may lie on the CPU.
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert (there + 1).device.type == "cuda"
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
