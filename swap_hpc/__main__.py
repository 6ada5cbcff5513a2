"""The commands; errors to one clear line; exit codes.

0: done. 1: nobody reads what is said. 2: the input is wrong. 3: the run failed. 75: stopped on request, all is saved. One rank
speaks for all.
"""

import io
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from swap_hpc import __version__
from swap_hpc.errors import RunError, Stopped, UserError, explained
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.schema import DataName, from_disk, on_disk
from swap_hpc.run.ending import fail, leave_unheard, nobody_reads, say, tell_launcher
from swap_hpc.run.part import Part, PhaseChoice, check_part, check_ranks
from swap_hpc.train.control import Control, ignore_stops

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Stochastic Weight Averaging in Parallel.",
)


def _utf8(path: Path | None) -> Path | None:
    """A run's folder or a file in it, which a library opens that takes UTF-8 alone. Raises UserError."""
    try:
        from_disk(path or "")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: rename it, or use a link to it") from None
    return path


DataDir = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder with the data, or to download it to."),
]


RunDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", callback=_utf8, help="The run's folder.  [default: runs/<recipe name>]"
    ),
]


StudyDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", callback=_utf8, help="The study's folder.  [default: runs/<study name>]"
    ),
]


PhaseOneOf = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="RUN", callback=_utf8, help="Begin with this complete run's phase 1."
    ),
]


Launcher = Annotated[str, typer.Option(metavar="LINE", help="What starts the ranks.")]


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K=V", help="Override a field: refine.epochs=10"),
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    data: DataDir = None,
    out: RunDir = None,
    overrides: Overrides = None,
    phase: Annotated[
        PhaseChoice | None,
        typer.Option(help="Only this one: other jobs do the others, into the same folder."),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --phase refine: the group to refine, on all ranks."),
    ] = None,
    phase_1_of: PhaseOneOf = None,
) -> None:
    """Run a recipe on all ranks that the launcher started."""
    control = Control()
    control.listen()
    part = Part(phase, group)
    # all that can be checked before torch, which takes seconds to import
    world = _world()
    parsed = world.agree(lambda: load_recipe(recipe, overrides or (), data))
    folder = out or Path("runs") / on_disk(parsed.name)
    world.agree(lambda: check_part(part, parsed))
    over = phase_1_of is not None or world.broadcast(
        world.first(lambda: (folder / "large_batch.safetensors").is_file())
    )
    world.agree(lambda: check_ranks(parsed, world.size, part, bool(over)))
    from swap_hpc.run import run
    from swap_hpc.run.display import Screen
    from swap_hpc.study import report

    result = run.train(parsed, folder, world, Screen(), control, STARTED, part, phase_1_of)
    if result:
        say(f"\n{report.table(result)}")


def _world() -> Any:
    """All ranks. Raises UserError where launcher and MPI library do not match."""
    from swap_hpc.parallel.mpi import launcher_mismatch
    from swap_hpc.parallel.teams import Team

    world = Team.world()
    if mismatch := launcher_mismatch(world):
        raise UserError(mismatch)
    return world


@app.command()
def average(
    run: Annotated[
        Path, typer.Argument(callback=_utf8, help="A run's folder; the run need not be complete.")
    ],
    groups: Annotated[
        str | None, typer.Option(metavar="0,2,3", help="The groups to average.  [default: all]")
    ] = None,
    data: DataDir = None,
) -> None:
    """Average the weights that a run's groups ended with, without training, and refresh batch norm."""
    world = _world()
    chosen = world.agree(lambda: _numbers("--groups", groups) if groups is not None else None)
    from swap_hpc.run import saved

    _say_result(saved.average(run, chosen, data, world))


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(callback=_utf8, help="Any .safetensors file that a run leaves.")
    ],
    data: DataDir = None,
) -> None:
    """Print the test accuracy and loss of a saved model."""
    world = _world()
    from swap_hpc.run import saved

    _say_result(saved.evaluate(checkpoint, data, world))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write the numbers as 0,2,3") from None


def _say_result(result: Any) -> None:
    for note in result.notes:
        say(note)
    say(
        f"{result.file}: test accuracy {100 * result.test.accuracy:.2f} %, test loss {result.test.loss:.4f}"
    )
    say(f"weights_sha256 {result.weights_sha256}")


@app.command()
def landscape(
    run: Annotated[Path, typer.Argument(callback=_utf8, help="A complete run's folder.")],
    points: Annotated[int, typer.Option(metavar="N", help="Of the grid, to a side.", min=3)] = 15,
    samples: Annotated[
        int, typer.Option(metavar="N", help="Images of each kind, at each point.", min=1)
    ] = 2000,
    data: DataDir = None,
) -> None:
    """Draw train and test error on planes through a run's weights, the points shared out to all ranks."""
    world = _world()
    from swap_hpc.study import landscape as landscapes

    say(f"written: {landscapes.landscape(run, data, points, samples, world, say)}, landscape.json")


@app.command()
def trajectory(
    run: Annotated[
        Path, typer.Argument(callback=_utf8, help="A complete run's folder, with snapshots.")
    ],
    samples: Annotated[int, typer.Option(metavar="N", help="Images for a gradient.", min=1)] = 2000,
    data: DataDir = None,
) -> None:
    """Draw how gradients point to the average along a run, and how far the groups are from each other."""
    world = _world()
    from swap_hpc.study import trajectory as trajectories

    say(f"written: {trajectories.trajectory(run, data, samples, world, say)}, trajectory.json")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one.")] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Every field of a recipe, explained, as Markdown.")
    ] = False,
) -> None:
    """List the shipped recipes, or show one."""
    from swap_hpc.recipe.loading import shipped_recipes

    files = shipped_recipes()
    if page:
        from swap_hpc.recipe import page as recipe_page

        say(recipe_page.page().rstrip())
    elif name is None:
        for known, file in files.items():
            first = file.read_text(encoding="utf-8").splitlines()[0]
            say(f"{known:<12} {first.lstrip('# ')}")
    elif name in files:
        say(files[name].read_text(encoding="utf-8").rstrip())
    else:
        raise UserError(f"no recipe {name!r}; there are {', '.join(files)}")


@app.command()
def data(
    name: Annotated[DataName, typer.Argument(help="The data set.")],
    directory: Annotated[Path, typer.Option("--data", metavar="DIR", help="Where to.")] = Path(
        "data"
    ),
) -> None:
    """Download a data set ahead of a job, on a login node, and verify it."""
    from swap_hpc.data import download
    from swap_hpc.parallel.grid import first_then_rest
    from swap_hpc.parallel.teams import Team

    say(first_then_rest(Team.world(), lambda: download(name, directory)))


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A folder with train/<class>/ and test/<class>/.")
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Where the shards go.")],
    samples_per_shard: Annotated[
        int, typer.Option(metavar="N", help="Images in a tar file.", min=1)
    ] = 1000,
) -> None:
    """Pack a folder of images into WebDataset shards with DALI's index files, shared out to the ranks."""
    world = _world()
    from swap_hpc.data import pack as packing

    number = packing.pack(source, out, samples_per_shard, world, say)
    say(f"{number} shards in {out}: --set data.name=webdataset --data {out}")


@app.command()
def doctor(
    groups: Annotated[int, typer.Option(help="Groups of the grid to look at.", min=1)] = 1,
) -> None:
    """Print versions, MPI, Horovod, GPUs, where each rank runs, and what is wrong."""
    from swap_hpc.parallel.teams import Team
    from swap_hpc.run import doctor

    say("\n".join(doctor.report(Team.world(), groups)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, complete or not.")],
) -> None:
    """Write a table and figures into runs' folders, as Markdown and as one HTML page."""
    from swap_hpc.run.folder import load_run
    from swap_hpc.study import report

    for folder in runs:
        say(f"{report.table(load_run(folder))}\n")
        say(f"written: {report.write_report(folder)}, report.html and the figures")


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A shipped study's name, or a TOML file.  [default: list the shipped ones]"
        ),
    ] = None,
    data: DataDir = None,
    out: StudyDir = None,
    overrides: Overrides = None,
    launcher: Launcher = "mpirun -n {ranks}",
) -> None:
    """Run all rows of a table, one after the other; again: what is missing of it."""
    from swap_hpc.study import study as studies
    from swap_hpc.study import table as study_report

    if name is None:
        for known in studies.shipped_studies():
            say(f"{known:<18} {studies.load_study(known).title}")
        return
    plan = studies.Plan(
        studies.load_study(name),
        out or Path("runs") / Path(name).stem,
        data,
        tuple(overrides or ()),
    )
    plan.check()
    for _ in studies.carry_out(plan.trials(), launcher, "search"):
        pass
    for _ in studies.carry_out(plan.reported(), launcher, "run"):
        written = study_report.write(plan)
    say(
        f"\n{study_report.text(plan)}\nwritten: {written}, {written.with_suffix('.json')}, {written.with_suffix('.png')}"
    )


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    ranks: Annotated[str, typer.Option(metavar="N,N", help="Numbers of ranks.")] = "8,64,512,4096",
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training samples, where the data set does not say.", min=1),
    ] = None,
    calibration: Annotated[
        Path, typer.Option(metavar="FILE", help="What swap-hpc bench scaling wrote.")
    ] = Path("runs/bench/scaling.json"),
    costs: Annotated[
        list[str] | None,
        typer.Option("--cost", metavar="K=V", help="Override a cost: bandwidth=25e9"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict seconds per phase on more ranks than are at hand, beside small-batch and large-batch SGD."""
    from swap_hpc.bench import plan as plans
    from swap_hpc.train import models

    say(
        plans.text(
            load_recipe(recipe, overrides or ()),
            _numbers("--ranks", ranks),
            samples,
            calibration,
            costs or (),
            models.size,
        )
    )


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(help="What to measure; all: of them.  [default: list them]")
    ] = None,
    recipe: Annotated[
        str, typer.Argument(help="For checkpoint: a shipped recipe's name, or a TOML file.")
    ] = "cifar10-cpu",
    data: DataDir = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the JSON goes; for checkpoint, the saves.")
    ] = Path("runs/bench"),
    overrides: Overrides = None,
    launcher: Launcher = "mpirun -n {ranks}",
) -> None:
    """Measure a part beside what a user would pick instead, alternating, in one run."""
    from swap_hpc import bench as benches

    if name == "checkpoint":
        world = _world()
        parsed = world.agree(lambda: load_recipe(recipe, overrides or (), data))
        world.agree(lambda: check_ranks(parsed, world.size))
        from swap_hpc.bench import checkpoint as saving

        say(saving.report(parsed, out, world))
    elif name is None:
        for known, what in benches.NAMES.items():
            say(f"{known:<12} {what}")
    elif name == "scaling":
        benches.scale(launcher, out, say)
    elif name == "all" or name in benches.BENCHES:
        benches.run(
            [*benches.BENCHES] if name == "all" else [name], launcher, out / f"{name}.json", say
        )
    else:
        raise UserError(f"no bench {name!r}; there are all, {', '.join(benches.NAMES)}")


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(f"swap_hpc {__version__}" if version else context.get_help())


STARTED = time.perf_counter()


def _traceback(error: BaseException) -> str:
    """Without the frames of the command line's library."""
    told = traceback.TracebackException.from_exception(error)
    told.stack = traceback.StackSummary.from_list(
        frame for frame in told.stack if not re.search(r"/(typer|click)/", frame.filename)
    )
    return "".join(told.format()).rstrip()


def _print_anything() -> None:
    """Lets no print fail: a name may hold bytes that are no UTF-8, and a terminal's encoding need not have all characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Runs the command line; errors end in one clear line, from one rank."""
    _print_anything()
    try:
        try:
            code = app(standalone_mode=False)
        except SystemExit as leaving:
            if not isinstance(
                leaving.__context__, BrokenPipeError
            ):  # of a user's own module: nothing here leaves so
                fail(3, _traceback(leaving))
            if nobody_reads():  # so typer leaves, whatever pipe it was
                leave_unheard()
            fail(3, _traceback(leaving.__context__))
        if code == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        ignore_stops()
        tell_launcher("done")
        sys.exit(code)
    except Stopped as stopped:
        ignore_stops()
        say(f"swap-hpc: {stopped}")
        tell_launcher("stopped")
        sys.exit(75)
    except UserError as error:
        fail(2, f"swap-hpc: {error}", error.reported_elsewhere)
    except RunError as error:
        fail(3, f"swap-hpc: {error}", error.reported_elsewhere)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("mpi4py", "nvidia", "torch", "torchvision"):
            fail(3, _traceback(error))
        fail(
            2,
            f"swap-hpc: {error.name} is not installed in this environment: make setup installs all that is needed",
        )
    except KeyboardInterrupt:
        fail(3, "swap-hpc: interrupted")
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line itself is wrong
            fail(2, f"swap-hpc: {error.format_message().rstrip('.')} (swap-hpc --help)")
        if isinstance(known := explained(error), UserError):
            fail(2, f"swap-hpc: {known}")
        fail(3, _traceback(error))


if __name__ == "__main__":
    main()
