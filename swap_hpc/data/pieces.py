"""Batches cut into pieces that take a bounded part of memory while they are decoded, however large the images are."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def

from swap_hpc.data.encoded import Encoded, encoded, explain_decode_error
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Shards

FEWEST_PIXELS = (
    2**25
)  # decoded at once where less memory is allowed: 96 MiB, so that threads have something to share
HEADERS = 64  # files that are read at once for their headers
READ_AHEAD = 2  # pieces whose bytes are read before DALI asks for them


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of a pick, decoded at once."""

    pick: Picks
    sources: list[np.ndarray]  # as DALI's graph takes them
    ends: bool  # whether the pick ends with it


def pixels_within(memory_gib: float) -> int:
    """How many pixels are decoded at once where that much memory is allowed: DALI holds two to three times as many, 3 bytes each."""
    return max(FEWEST_PIXELS, int(memory_gib * 2**30 / 8 / 3))


def pieces(
    split: Encoded,
    picks: Iterator[Picks],
    pixels: int,
    threads: int,
    resized: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """Each pick, in turn, as pieces of at most `pixels`, or of one image. Raises RunError naming an image that cannot be read.

    `resized`: (height, width) that each image is made not smaller than; those pixels, which are many where it is long, count, too.
    """
    headers = Headers(split, threads)
    for whole in _read_ahead(split, picks, 3 * pixels, threads):
        places = [*cut(_pixels(headers.sizes(whole), resized), pixels)]
        for place in places:
            yield Piece(
                _part(whole.pick, place), whole.sources[place], whole.ends and place is places[-1]
            )


def _pixels(sizes: np.ndarray, resized: tuple[int, int] | None) -> np.ndarray:
    """(n,) float64: of images of these sizes, and of the same resized."""
    scales = (np.array(resized) / sizes).max(axis=1) if resized else np.zeros(len(sizes))
    return sizes.prod(axis=1, dtype=np.float64) * (1 + scales**2)


def cut(amounts: np.ndarray, limit: int) -> Iterator[slice]:
    """Consecutive slices whose amounts add up to at most `limit`, or of one item."""
    begin, total = 0, 0
    for item, amount in enumerate(amounts.tolist()):
        if item > begin and total + amount > limit:
            yield slice(begin, item)
            begin, total = item, 0
        total += amount
    yield slice(begin, len(amounts))


class Headers:
    """What images' headers say of their sizes, read in a pipeline of its own, which decodes nothing."""

    def __init__(self, split: Encoded, threads: int):
        self.split, self.threads = split, threads
        self._pipeline: Pipeline | None = None

    def sizes(self, piece: Piece) -> np.ndarray:
        """(n, 2) int32: height and width of each image of a piece. A file is looked at once, in its split's first epoch.

        Raises RunError.
        """
        known, samples = self.split.sizes, piece.pick.indices
        new = np.flatnonzero(known[samples, 0] == 0)
        for begin in range(0, len(new), HEADERS):
            some = new[begin : begin + HEADERS]
            self.shapes(samples[some], [piece.sources[i] for i in some])
        return known[samples]

    def shapes(
        self, samples: np.ndarray, sources: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """(n, 3) int64: height, width and channels of at most `HEADERS` images. Raises RunError naming one that cannot be read."""
        if self._pipeline is None:
            self._pipeline = self._built()
        try:
            self._pipeline.feed_input("sources", list(sources or self.split.sources(samples)))
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            explain_decode_error(self.split, samples, error)
            raise
        shapes = np.array(output.as_tensor())
        self.split.sizes[samples] = shapes[:, :2]
        return shapes

    def _built(self) -> Pipeline:
        def graph() -> Any:
            return fn.peek_image_shape(encoded(self.split, fn.external_source(name="sources")))

        # nothing ahead: what is fed is what comes out
        return pipeline_def(graph)(
            batch_size=HEADERS,
            num_threads=self.threads,
            device_id=None,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )


def _read_ahead(
    split: Encoded, picks: Iterator[Picks], limit: int, threads: int
) -> Iterator[Piece]:
    """Each pick with what `split.sources` gives for it. Bytes out of shards are read by threads, before they are asked for, and
    at most `limit` of them, or one image, as one piece."""
    if not isinstance(split, Shards):
        yield from (Piece(pick, split.sources(pick.indices), True) for pick in picks)
        return
    with ThreadPoolExecutor(max(4, threads), "read") as pool:
        reading: deque[tuple[Picks, list[Future[np.ndarray]], bool]] = deque()
        for pick in picks:
            places = [*cut(split.size[pick.indices], limit)]
            for place in places:
                part = _part(pick, place)
                reading.append(
                    (part, [pool.submit(split.read, i) for i in part.indices], place is places[-1])
                )
                if len(reading) > READ_AHEAD:
                    yield _ready(*reading.popleft())
        yield from (_ready(*each) for each in reading)


def _ready(pick: Picks, reading: list[Future[np.ndarray]], ends: bool) -> Piece:
    return Piece(pick, [each.result() for each in reading], ends)


def _part(pick: Picks, place: slice) -> Picks:
    return Picks(pick.indices[place], None if pick.draws is None else pick.draws[place])
