"""What a model predicts for each sample of a split, as a CSV file that all ranks write together."""

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from swap_hpc.data.dataset import SplitName
from swap_hpc.data.splits import Batches
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_whole
from swap_hpc.parallel.teams import Team
from swap_hpc.train.evaluation import evaluate
from swap_hpc.train.events import Evaluation
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.objective import as_float32

# The names of files may hold bytes that are not UTF-8.
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def evaluate_and_write(
    model: nn.Module, job: Job, team: Team, split: SplitName, file: Path
) -> Evaluation:
    """Evaluate `model` on a split, and write its outputs for each sample. Collective.

    The columns are `index` (in the split, from 0), `name` (the path of an image, if it comes from
    one), `target` and `output_0`, `output_1` ...; the rows are in the split's order. Each rank
    writes its batches into a part beside the file, and the first rank joins the parts line by line,
    so that no rank holds more than a batch. All ranks must see the folder.

    Raises:
        UserError: the outputs are not (n, k) or (n,), or the targets not (n,).
        RunError: on all ranks, a file cannot be written.
    """
    team.agree(lambda: _check_folder(file))
    part = _part(file, team.rank)
    recording = _Recording(model)
    try:
        opened = team.agree(lambda: _opened(part, file))
        with opened, job.autocast():
            rows = _written(job, team, split, recording, opened)
            result = evaluate(recording, rows, team, job.objective)
        team.barrier()  # until every part is whole
        parts = [_part(file, rank) for rank in range(team.size)]
        size = job.recipe.evaluate.batch_size
        team.first(lambda: write_whole(file, lambda path: _join(parts, size, path)))
    except OSError as error:
        raise _unwritten(file, error) from None
    finally:
        part.unlink(missing_ok=True)
    return result


class _Recording(nn.Module):
    """A model that keeps its last outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs: Any = None

    def forward(self, inputs: Any) -> Any:
        self.outputs = self.model(inputs)
        return self.outputs


def _check_folder(file: Path) -> None:
    if file.suffix != ".csv":
        raise UserError(f"--predictions {file}: predictions are a table, so name a .csv file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--predictions {file}: {error.strerror}") from None


def _opened(part: Path, file: Path) -> IO[str]:
    try:
        return open(part, "w", **TEXT)
    except OSError as error:
        raise _unwritten(file, error) from None


def _unwritten(file: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {file}: {error.strerror or error}")


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f".{file.name}.{rank}")


def _written(
    job: Job, team: Team, split: SplitName, model: _Recording, file: IO[str]
) -> Iterator[Batch]:
    """Yield this rank's batches; write the rows of each when the model has seen it."""
    samples, size = job.dataset.splits[split], job.recipe.evaluate.batch_size
    table = csv.writer(file, lineterminator="\n")
    for number, (inputs, targets) in enumerate(job.test_batches(team, split)):
        yield inputs, targets
        first = (number * team.size + team.rank) * size
        outputs = _as_table(model.outputs, targets)
        for place, (target, values) in enumerate(
            zip(targets.tolist(), outputs.tolist(), strict=True), first
        ):
            name = "" if isinstance(samples, Batches) else samples.name(place)
            table.writerow([place, name, target, *(f"{value:.9g}" for value in values)])


def _as_table(outputs: Any, targets: Any) -> Tensor:
    """Return outputs as (n, k) float32 on the CPU."""
    outputs = as_float32(outputs)
    is_plain = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if not is_plain or outputs.ndim not in (1, 2) or targets.ndim != 1:
        raise UserError(
            "--predictions writes a row of numbers for each sample: it needs outputs (n, k) or "
            "(n,), and targets (n,)"
        )
    return outputs.reshape(len(outputs), -1).detach().to("cpu", torch.float32)


def _join(parts: list[Path], size: int, file: Path) -> None:
    """Write the ranks' batches of `size` rows, taken in turn, below one line with the names."""
    with ExitStack() as stack, open(file, "w", **TEXT) as joined:
        opened = [stack.enter_context(open(p, **TEXT)) for p in parts]
        rows = [csv.reader(each) for each in opened]
        table = csv.writer(joined, lineterminator="\n")
        has_head = False
        while True:
            for part in rows:
                for _ in range(size):
                    row = next(part, None)
                    if row is None:
                        return
                    if not has_head:
                        outputs = (f"output_{i}" for i in range(len(row) - 3))
                        table.writerow(["index", "name", "target", *outputs])
                        has_head = True
                    table.writerow(row)
