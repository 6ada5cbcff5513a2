"""DALI pipelines on a rank's device: how they are built, run to their end, and read by torch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from swap_hpc.data.transfer import to_device
from swap_hpc.parallel.devices import Device

ON_GPU = 2  # kDLCUDA, DLPack's number for CUDA's memory


def build_pipeline(graph: Callable[[], Any], batch_size: int, device: Device) -> Pipeline:
    """Build a pipeline of `graph`, whose batches hold at most `batch_size` samples."""
    return _built(graph, batch_size, device)


def build_branching_pipeline(graph: Callable[[], Any], batch_size: int, device: Device) -> Pipeline:
    """Build a pipeline of a graph in which samples go different ways.

    DALI rewrites the graph's Python code for it.
    """
    return _built(graph, batch_size, device, enable_conditionals=True)


def _built(graph: Callable[[], Any], batch_size: int, device: Device, **options: bool) -> Pipeline:
    index = device.torch.index if device.torch.type == "cuda" else None
    # sampling.py draws all that is random; the seed only keeps DALI from choosing one
    return pipeline_def(graph, **options)(
        batch_size=batch_size,
        num_threads=device.threads,
        device_id=index,
        seed=0,
        prefetch_queue_depth=2,
    )


def run_pipeline(pipeline: Pipeline, device: Device) -> Iterator[tuple[Any, ...]]:
    """Yield a pipeline's outputs, batch by batch, until its external source ends."""
    # On a GPU this stream waits for DALI's output, and DALI waits for it before it uses the
    # memory again.
    on_gpu = device.torch.type == "cuda"
    stream = torch.cuda.current_stream(device.torch) if on_gpu else None
    while True:
        try:
            outputs = pipeline.run(stream)
        except StopIteration:
            return
        yield outputs


def to_torch(output: Any, device: Device) -> Tensor:
    """Return an output, any object with a DLPack interface, as a tensor that may be kept.

    An output on the CPU that goes to a GPU is copied now: the transfer would still run while DALI
    uses the memory again.
    """
    if device.torch.type == "cuda" and output.__dlpack_device__()[0] != ON_GPU:
        # by way of numpy: the memory may be pinned, which torch does not accept through DLPack
        return to_device(np.array(np.from_dlpack(output)), device.torch)
    return torch.from_dlpack(output)
