"""GPUs that torch can use, and one line for those that it cannot; torch's view is replaced."""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from launch import command

from swap_hpc.errors import UserError, explained
from swap_hpc.parallel import devices
from swap_hpc.parallel.devices import Capability, Device, Memory, choose_device, serves, use_device
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, refinement_of
from swap_hpc.run import prepare
from swap_hpc.run.lines import Line
from swap_hpc.run.problems import core_problem
from swap_hpc.run.result import peak_memory

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch 2.14.1's wheel
CUDA_12 = ["sm_70", *CUDA_13]  # of torch 2.10.0's
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (CUDA_13, (7, 0), False),  # V100
        (CUDA_12, (7, 0), True),
        (CUDA_13, (7, 5), True),  # T4
        (CUDA_13, (8, 9), True),  # L4: machine code for 8.6, or 8.0
        (CUDA_13, (9, 0), True),
        (CUDA_13, (11, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_80", "compute_80"], (12, 0), True),  # PTX
        (["sm_80", "compute_80"], (7, 5), False),
        (["gfx90a"], (9, 0), False),  # AMD's
        ([], (9, 0), True),  # torch does not know what it was built for
    ],
)
def test_the_gpus_that_code_runs_on(
    architectures: list[str], capability: Capability, expected: bool
) -> None:
    assert serves(architectures, capability) == expected


def show_gpu(
    monkeypatch: pytest.MonkeyPatch,
    name: str = "Tesla V100",
    capability: Capability = (7, 0),
    cuda: str = "13.0",
    error: str = "",
) -> None:
    """Let torch see a GPU.

    Args:
        monkeypatch: replaces torch's functions.
        name: the GPU's.
        capability: the GPU's.
        cuda: the version that torch was built for.
        error: what torch raises when it is asked for more than the number of GPUs.
    """

    def properties(index: int) -> SimpleNamespace:
        if error:
            raise RuntimeError(error)
        major, minor = capability
        return SimpleNamespace(name=name, major=major, minor=minor, uuid="one")

    architectures = CUDA_13 if cuda.startswith("13") else CUDA_12
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def refusal(monkeypatch: pytest.MonkeyPatch, **gpu: Any) -> str:
    """Return the line that refuses a GPU; its hint, the CPU, works."""
    show_gpu(monkeypatch, **gpu)
    with pytest.raises(UserError) as refused:
        choose_device(Team.alone(), "auto")
    assert "\n" not in str(refused.value)
    assert choose_device(Team.alone(), "cpu").torch.type == "cpu"
    return str(refused.value)


def test_a_driver_that_is_too_old_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: " 535.54.03")
    assert refusal(monkeypatch, error=TOO_OLD) == (
        "the GPU's driver 535.54.03 is too old for CUDA 13, which needs 580 or newer: "
        "update it, make setup CUDA=12, or --set device=cpu"
    )
    assert refusal(monkeypatch, error=TOO_OLD, cuda="12.8") == (
        "the GPU's driver 535.54.03 is too old for CUDA 12, which needs 525 or newer: "
        "update it or --set device=cpu"
    )


def test_a_gpu_that_fails_otherwise_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "CUDA unknown error - this may be due\n to an incorrectly set up environment"
    assert refusal(monkeypatch, error=error).startswith(
        "torch sees a GPU and cannot use it (CUDA unknown error - "
        "this may be due to an incorrectly set up environment): nvidia-smi, or"
    )


def test_a_gpu_that_torch_is_not_built_for_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch).startswith(
        f"Tesla V100 has compute capability 7.0, which torch {torch.__version__} "
        f"is not built for ({' '.join(CUDA_13)}): make setup CUDA=12"
    )
    line = refusal(monkeypatch, name="Tesla P100", capability=(6, 0), cuda="12.8")
    assert "take another GPU, or --set device=cpu" in line


@pytest.mark.parametrize(
    ("name", "capability", "cuda"), [("Tesla V100", (7, 0), "12.8"), ("Tesla T4", (7, 5), "13.0")]
)
def test_bf16_is_refused_where_a_gpu_emulates_it(
    name: str, capability: Capability, cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpu(monkeypatch, name, capability, cuda)
    device = choose_device(Team.alone(), "auto")
    prepare.check_device(tiny.recipe(precision="fp32"), device)
    major, minor = capability
    message = rf"bf16.*8\.0 \(A100\) or newer, and {name} has {major}\.{minor}: .*=fp16 or fp32$"
    with pytest.raises(UserError, match=message):
        prepare.check_device(tiny.recipe(precision="bf16"), device)
    prepare.check_device(tiny.recipe(precision="fp16"), device)


def test_fp16_is_refused_where_a_gpu_cannot_compute_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maxwell = Device(torch.device("cuda", 0), threads=1, uuid="one", capability=(5, 2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 980")
    with pytest.raises(UserError, match=r"fp16.*5\.3 or newer, and GeForce GTX 980 has 5\.2"):
        prepare.check_device(tiny.recipe(precision="fp16"), maxwell)


def test_bf16_is_used_where_a_gpu_has_it_and_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.check_device(tiny.recipe(precision="bf16"), choose_device(Team.alone(), "cpu"))
    show_gpu(monkeypatch, "A100", (8, 0))
    prepare.check_device(tiny.recipe(precision="bf16"), choose_device(Team.alone(), "cuda"))


@pytest.mark.parametrize(("kind", "program"), [("cpu", "g++"), ("cuda", "gcc")])
def test_compile_needs_a_compiler_and_headers(
    kind: str, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, recipe = Device(torch.device(kind), 1), tiny.recipe(compile=True)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    needed = rf"needs a compiler \({re.escape(program)}\) where the ranks run"
    with pytest.raises(UserError, match=rf"compile = true: torch\.compile {needed}"):
        prepare.check_device(recipe, device)
    (tmp_path / program).write_text("#!/bin/sh\n")
    (tmp_path / program).chmod(0o755)
    prepare.check_device(recipe, device)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"needs Python's headers \(.*Python\.h\) where"):
        prepare.check_device(recipe, device)
    prepare.check_device(tiny.recipe(), device)


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's settings after a test, which begins without cuBLAS's."""
    # `monkeypatch` only restores, or removes, a variable that it has set itself.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def settings() -> tuple[bool, bool, bool, str | None]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, False, False, None)),
        ({"deterministic": True}, (True, True, False, ":4096:8")),
        ({"cudnn_benchmark": True}, (False, False, True, None)),
    ],
)
def test_algorithms_are_those_of_the_recipe(
    fields: dict[str, bool],
    expected: tuple[bool, bool, bool, str | None],
    algorithms: None,
) -> None:
    prepare.choose_algorithms(tiny.recipe(**fields))
    assert settings() == expected


# Prints the GPUs that pytest shows to the tests that it collects.
COLLECTED = """
import os, sys, pytest

class Ends:
    def pytest_collection(self, session):
        print('seen:' + os.environ['CUDA_VISIBLE_DEVICES'] + '.')
        return True

pytest.main([*sys.argv[1:], '-q', '-p', 'no:cacheprovider'], plugins=[Ends()])
"""


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["tests/gpu"], "3"),
        (["tests/unit", "tests/gpu"], ""),
        ([], ""),
    ],
)
def test_the_suite_hides_the_gpu_from_all_but_its_own_tests(
    arguments: list[str], seen: str
) -> None:
    """The losses and times of other tests are those of CPUs.

    A session that has started CUDA cannot hide the GPU any more.
    """
    top = Path(__file__).parents[2]
    variables = {"CUDA_VISIBLE_DEVICES": "3"}
    done = command(sys.executable, "-c", COLLECTED, *arguments, cwd=top, variables=variables)
    assert f"seen:{seen}." in done.stdout, done.stdout + done.stderr


def test_a_gpu_that_another_process_has_to_itself_gets_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\n"
            "CUDA kernel errors might be ..."
        )

    show_gpu(monkeypatch, "H100", (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    message = "torch sees a GPU and cannot use it .*busy or unavailable"
    with pytest.raises(UserError, match=message) as refused:
        use_device(Team.alone(), Team.alone(), "auto")
    assert "\n" not in str(refused.value)


def test_a_gpu_whose_memory_is_full_gets_one_line() -> None:
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB.\n"
        "GPU 0 has a total capacity of 79.1 GiB of which ..."
    )
    known = explained(full)
    assert isinstance(known, UserError) and "\n" not in str(known)
    message = (
        r"the GPU's memory is full \(CUDA out of memory\. Tried.*or raise large_batch\.accumulate"
    )
    assert re.match(message, str(known))
    other = RuntimeError("out of memory")
    assert explained(other) is other


def test_doctor_tells_of_a_rank_with_a_gpu_and_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(torch.device("cuda", 0), 1, "one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert core_problem(Team.alone(), gpu) == (
        "rank 0 has a GPU and one core: "
        "mpirun --bind-to none, or srun --cpus-per-task, gives it more"
    )
    assert core_problem(Team.alone(), Device(torch.device("cpu"), 1)) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4})
    assert core_problem(Team.alone(), gpu) is None


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="deterministic and cudnn_benchmark exclude each other"):
        tiny.recipe(deterministic=True, cudnn_benchmark=True)
    with pytest.raises(UserError, match="fused belongs to sgd and adamw: lars has none"):
        tiny.recipe(optimizer={"name": "lars", "fused": True})


def test_peak_memory_of_host_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**20)
    peak = Device(torch.device("cuda", 0), 1, "one").peak_memory()
    assert (peak.gpu_allocated, peak.gpu_reserved) == (3 * 2**20, 5 * 2**20)
    assert peak.host > 2**20
    on_cpu = Device(torch.device("cpu"), 1).peak_memory()
    assert (on_cpu.gpu_allocated, on_cpu.gpu_reserved) == (0, 0)


def memory_line(host: float, allocated: float | None, reserved: float | None) -> Line:
    """Return the memory of a line of metrics, in MiB."""
    return {
        "peak_memory_mib": host,
        "peak_gpu_allocated_mib": allocated,
        "peak_gpu_reserved_mib": reserved,
    }


def test_a_result_holds_the_largest_peak_of_all_starts() -> None:
    lines: dict[Part, list[Line]] = {
        PHASE_1: [{"phase": "evaluation"}, memory_line(700.0, 50.0, 60.0)],
        refinement_of(0): [memory_line(700.0, 50.0, 90.0)],
    }
    found = peak_memory(lines, Memory(600 * 2**20, 70 * 2**20, 80 * 2**20), Team.alone())
    assert found == {"host": 700.0, "gpu_allocated": 70.0, "gpu_reserved": 90.0}
    on_cpu: dict[Part, list[Line]] = {PHASE_1: [memory_line(5.0, None, None)]}
    found = peak_memory(on_cpu, Memory(2**20), Team.alone())
    assert found == {"host": 5.0, "gpu_allocated": None, "gpu_reserved": None}
