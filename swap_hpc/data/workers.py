"""Threads that work ahead of a stream."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def workers(number: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Start threads for a generator, which end with it.

    They are not waited for. The garbage collector ends a generator that was given up, wherever it
    happens to run: inside `threading`, too, whose locks a wait for a thread would need.
    """
    pool = ThreadPoolExecutor(number, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
