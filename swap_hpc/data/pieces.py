"""Batches cut into pieces, so that decoding takes bounded memory however large the images are."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def

from swap_hpc.data.encoded import Encoded, explain_decode_error, file_content
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Shards
from swap_hpc.data.workers import workers

BYTES_PER_PIXEL = 3

# The fewest pixels decoded at once, however little memory is allowed: 96 MiB, which leaves several
# images for the threads to share.
MIN_PIXELS = 2**25
HEADERS_AT_ONCE = 64  # images whose headers are read together
READ_AHEAD = 2  # pieces whose bytes are read before DALI asks for them


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of a pick that are decoded at once."""

    pick: Picks
    sources: list[np.ndarray]  # as `Files.sources` or `Shards.sources` returns them
    is_last: bool  # whether the pick ends here


def pixels_within(memory_gib: float) -> int:
    """Return how many pixels may be decoded at once where `memory_gib` of memory is allowed.

    An eighth of the memory holds them: DALI keeps two to three times as many.
    """
    return max(MIN_PIXELS, int(memory_gib * 2**30 / 8 / BYTES_PER_PIXEL))


def pieces(
    split: Encoded,
    picks: Iterator[Picks],
    pixels: int,
    threads: int,
    resized: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """Cut each pick, in turn, into pieces.

    Args:
        split: what the picks belong to.
        picks: the samples of each batch.
        pixels: the most pixels of a piece; always at least one image.
        threads: CPU threads.
        resized: (height, width) to which each image is enlarged or reduced, keeping its aspect
            ratio, so that neither side is smaller. The resized pixels count too: a long image has
            many.

    Raises:
        RunError: an image cannot be read; it is named.
    """
    headers = Headers(split, threads)
    for whole in _read_ahead(split, picks, BYTES_PER_PIXEL * pixels, threads):
        amounts = _pixels(headers.sizes(whole), resized)
        places = [*cut(amounts, pixels)]
        for place in places:
            is_last = whole.is_last and place is places[-1]
            yield Piece(_part(whole.pick, place), whole.sources[place], is_last)


def _pixels(sizes: np.ndarray, resized: tuple[int, int] | None) -> np.ndarray:
    """Return (n,) float64: the pixels of images of these sizes, plus those of the same resized."""
    own = sizes.prod(axis=1, dtype=np.float64)
    if resized is None:
        return own
    scales = (np.array(resized) / sizes).max(axis=1)
    return own * (1 + scales**2)


def cut(amounts: np.ndarray, limit: int) -> Iterator[slice]:
    """Yield consecutive slices whose amounts add up to at most `limit`, or that hold one item."""
    begin, total = 0, 0
    for item, amount in enumerate(amounts.tolist()):
        if item > begin and total + amount > limit:
            yield slice(begin, item)
            begin, total = item, 0
        total += amount
    yield slice(begin, len(amounts))


class Headers:
    """The sizes of images, which a pipeline of its own reads from their headers.

    The pipeline decodes nothing. It is built when it is first needed.
    """

    def __init__(self, split: Encoded, threads: int):
        self.split, self.threads = split, threads
        self._pipeline: Pipeline | None = None

    def sizes(self, piece: Piece) -> np.ndarray:
        """Return (n, 2) int32: height and width of each image of a piece.

        Each header is read once, in the first epoch of its split.

        Raises:
            RunError: an image cannot be read; it is named.
        """
        known, samples = self.split.sizes, piece.pick.indices
        missing = np.flatnonzero(known[samples, 0] == 0)
        for begin in range(0, len(missing), HEADERS_AT_ONCE):
            some = missing[begin : begin + HEADERS_AT_ONCE]
            self.shapes(samples[some], [piece.sources[i] for i in some])
        return known[samples]

    def shapes(
        self, samples: np.ndarray, sources: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Read the headers of some images, and keep their sizes in `split.sizes`.

        Args:
            samples: (n,) int64, at most `HEADERS_AT_ONCE`.
            sources: what `split.sources` returns for them, where that is known already.

        Returns:
            (n, 3) int64: height, width and channels.

        Raises:
            RunError: an image cannot be read; it is named.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("sources", list(sources or self.split.sources(samples)))
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # it is of no use after an error
            explain_decode_error(self.split, samples, error)
            raise
        shapes = np.array(output.as_tensor())
        self.split.sizes[samples] = shapes[:, :2]
        return shapes

    def _build(self) -> Pipeline:
        def graph() -> Any:
            source = fn.external_source(name="sources")
            return fn.peek_image_shape(file_content(self.split, source))

        # nothing runs ahead: each run returns what was fed just before
        return pipeline_def(graph)(
            batch_size=HEADERS_AT_ONCE,
            num_threads=self.threads,
            device_id=None,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )


@dataclass(frozen=True)
class _Reading:
    """A piece whose bytes are being read."""

    pick: Picks
    images: list[Future[np.ndarray]]
    is_last: bool

    def piece(self) -> Piece:
        """Wait for the bytes."""
        return Piece(self.pick, [image.result() for image in self.images], self.is_last)


def _read_ahead(
    split: Encoded, picks: Iterator[Picks], limit: int, threads: int
) -> Iterator[Piece]:
    """Yield each pick with its sources.

    DALI reads files itself: each pick is one piece, with its paths. Threads read images out of
    shards before they are asked for, in pieces of at most `limit` bytes, or of one image.
    """
    if not isinstance(split, Shards):
        for pick in picks:
            yield Piece(pick, split.sources(pick.indices), is_last=True)
        return
    # at least four threads: they wait for the file system more than they use a core
    with workers(max(4, threads), "read") as pool:
        reading: deque[_Reading] = deque()
        for pick in picks:
            places = [*cut(split.size[pick.indices], limit)]
            for place in places:
                part = _part(pick, place)
                images = [pool.submit(split.read, i) for i in part.indices]
                reading.append(_Reading(part, images, is_last=place is places[-1]))
                if len(reading) > READ_AHEAD:
                    yield reading.popleft().piece()
        for rest in reading:
            yield rest.piece()


def _part(pick: Picks, place: slice) -> Picks:
    draws = None if pick.draws is None else pick.draws[place]
    more = {name: each[place] for name, each in pick.more.items()}
    return Picks(pick.indices[place], draws, more)
