"""GPUs that torch can use, and those that end in one line; torch's view of the GPU is replaced."""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    ("architectures", "capability", "serve"),
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
        (["gfx90a"], (9, 0), False),
        ([], (9, 0), True),
    ],
)
def test_which_gpus_code_runs_on(
    architectures: list[str], capability: Capability, serve: bool
) -> None:
    assert serves(architectures, capability) == serve


def shows(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: Capability,
    cuda: str = "13.0",
    error: str = "",
) -> None:
    """Lets torch see a GPU, or fail with `error` where it is asked for more than their number."""

    def properties(index: int) -> SimpleNamespace:
        if error:
            raise RuntimeError(error)
        return SimpleNamespace(name=name, major=capability[0], minor=capability[1], uuid="one")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(
        torch.cuda, "get_arch_list", lambda: CUDA_13 if cuda.startswith("13") else CUDA_12
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def refusal(monkeypatch: pytest.MonkeyPatch, **gpu: object) -> str:
    shows(monkeypatch, **({"name": "Tesla V100", "capability": (7, 0)} | gpu))  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        choose_device(Team.alone(), "auto")
    assert "\n" not in str(refused.value)
    assert choose_device(Team.alone(), "cpu").torch.type == "cpu"  # which its hint names
    return str(refused.value)


def test_a_driver_that_is_too_old_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: " 535.54.03")
    says = "the GPU's driver 535.54.03 is too old for CUDA 13, which needs 580 or newer: update it, make setup CUDA=12, or --set device=cpu"
    assert refusal(monkeypatch, error=TOO_OLD) == says
    says = "the GPU's driver 535.54.03 is too old for CUDA 12, which needs 525 or newer: update it or --set device=cpu"
    assert refusal(monkeypatch, error=TOO_OLD, cuda="12.8") == says


def test_a_gpu_that_fails_otherwise_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "torch sees a GPU and cannot use it (CUDA unknown error - this may be due to an incorrectly set up environment): nvidia-smi, or"
    assert refusal(
        monkeypatch,
        error="CUDA unknown error - this may be due\n to an incorrectly set up environment",
    ).startswith(says)


def test_a_gpu_that_torch_is_not_built_for_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    says = f"Tesla V100 has compute capability 7.0, which torch {torch.__version__} is not built for ({' '.join(CUDA_13)}): make setup CUDA=12"
    assert refusal(monkeypatch).startswith(says)
    assert "take another GPU, or --set device=cpu" in refusal(
        monkeypatch, name="Tesla P100", capability=(6, 0), cuda="12.8"
    )


@pytest.mark.parametrize(
    ("name", "capability", "cuda"), [("Tesla V100", (7, 0), "12.8"), ("Tesla T4", (7, 5), "13.0")]
)
def test_bf16_is_refused_where_a_gpu_imitates_it(
    name: str, capability: Capability, cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows(monkeypatch, name, capability, cuda)
    device = choose_device(Team.alone(), "auto")
    prepare.check_device(tiny.recipe(precision="fp32"), device)
    with pytest.raises(
        UserError,
        match=rf"bf16.*8\.0 \(A100\) or newer, and {name} has {capability[0]}\.{capability[1]}: .*fp32 \(fp16",
    ):
        prepare.check_device(tiny.recipe(precision="bf16"), device)


def test_bf16_is_used_where_a_gpu_has_it_and_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.check_device(tiny.recipe(precision="bf16"), choose_device(Team.alone(), "cpu"))
    shows(monkeypatch, "A100", (8, 0))
    prepare.check_device(tiny.recipe(precision="bf16"), choose_device(Team.alone(), "cuda"))


@pytest.mark.parametrize(("kind", "program"), [("cpu", "g++"), ("cuda", "gcc")])
def test_compile_wants_a_compiler_and_headers(
    kind: str, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, recipe = Device(torch.device(kind), 1), tiny.recipe(compile=True)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError,
        match=rf"compile = true: torch\.compile needs a compiler \({program.replace('+', '[+]')}\) where the ranks run",
    ):
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
    """Torch's settings as they were, afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
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
def test_algorithms_are_chosen_as_a_recipe_says(
    fields: dict[str, bool],
    expected: tuple[bool, bool, bool, str | None],
    algorithms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare.choose_algorithms(tiny.recipe(**fields))
    assert settings() == expected
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.mark.parametrize(
    ("arguments", "seen"), [(["tests/gpu"], "3"), (["tests/unit", "tests/gpu"], ""), ([], "")]
)
def test_the_suite_hides_the_gpu_but_for_its_own_tests(arguments: list[str], seen: str) -> None:
    """Losses and times elsewhere are those of CPUs; and a session that has started CUDA cannot hide it any more."""
    code = (
        "import os, sys, pytest\n"
        "class Ends:\n"
        "    def pytest_collection(self, session):\n"
        "        print('seen:' + os.environ['CUDA_VISIBLE_DEVICES'] + '.')\n"
        "        return True\n"
        "pytest.main([*sys.argv[1:], '-q', '-p', 'no:cacheprovider'], plugins=[Ends()])\n"
    )
    done = command(
        sys.executable,
        "-c",
        code,
        *arguments,
        cwd=Path(__file__).parents[2],
        variables={"CUDA_VISIBLE_DEVICES": "3"},
    )
    assert f"seen:{seen}." in done.stdout, done.stdout + done.stderr


def test_a_gpu_that_another_process_has_to_itself_gets_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(device: torch.device) -> None:
        raise RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be ..."
        )

    shows(monkeypatch, "H100", (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(
        UserError, match="torch sees a GPU and cannot use it .*busy or unavailable"
    ) as refused:
        use_device(Team.alone(), Team.alone(), "auto")
    assert "\n" not in str(refused.value)


def test_a_gpu_whose_memory_is_full_gets_one_line() -> None:
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 79.1 GiB of which ..."
    )
    known = explained(full)
    assert isinstance(known, UserError) and "\n" not in str(known)
    assert re.match(
        r"the GPU's memory is full \(CUDA out of memory\. Tried.*or raise large_batch\.accumulate",
        str(known),
    )
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
    with pytest.raises(UserError, match="fused is for sgd only: lars has no fused step"):
        tiny.recipe(optimizer={"name": "lars", "fused": True})


def test_peak_memory_is_told_of_host_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**20)
    peak = Device(torch.device("cuda", 0), 1, "one").peak_memory()
    assert (peak.gpu_allocated, peak.gpu_reserved) == (3 * 2**20, 5 * 2**20) and peak.host > 2**20
    here = Device(torch.device("cpu"), 1).peak_memory()
    assert (here.gpu_allocated, here.gpu_reserved) == (0, 0)


def test_a_result_holds_the_most_of_all_starts() -> None:
    before: Line = {
        "peak_memory_mib": 700.0,
        "peak_gpu_allocated_mib": 50.0,
        "peak_gpu_reserved_mib": 60.0,
    }
    lines: dict[Part, list[Line]] = {
        PHASE_1: [{"phase": "evaluation"}, before],
        refinement_of(0): [before | {"peak_gpu_reserved_mib": 90.0}],
    }
    found = peak_memory(lines, Memory(600 * 2**20, 70 * 2**20, 80 * 2**20), Team.alone())
    assert found == {"host": 700.0, "gpu_allocated": 70.0, "gpu_reserved": 90.0}
    on_cpu: dict[Part, list[Line]] = {
        PHASE_1: [
            {"peak_memory_mib": 5.0, "peak_gpu_allocated_mib": None, "peak_gpu_reserved_mib": None}
        ]
    }
    assert peak_memory(on_cpu, Memory(2**20), Team.alone()) == {
        "host": 5.0,
        "gpu_allocated": None,
        "gpu_reserved": None,
    }
