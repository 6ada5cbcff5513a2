"""The command line. An error ends all ranks with one clear line, which one rank prints.

Exit codes:
    0: Done.
    1: Nobody reads the output: a pipe was closed.
    2: The input is wrong.
    3: The run failed.
    75: The run was asked to stop, and everything is saved.
"""

import io
import json
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from swap_hpc import __version__
from swap_hpc.errors import RunError, Stopped, UserError, explained
from swap_hpc.parallel.launcher import launched
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.metrics import with_unit
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.values import DataName, from_disk, on_disk
from swap_hpc.run.checks import check_ranks, chosen_part
from swap_hpc.run.ending import fail, leave_unheard, nobody_reads, say, tell_launcher
from swap_hpc.run.folder import phase_1_is_over
from swap_hpc.train.control import Control, ignore_stops

STARTED = time.perf_counter()  # the time from here to the first step is a run's set-up

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Stochastic Weight Averaging in Parallel.",
)


def _utf8(path: Path | None) -> Path | None:
    """Return a path unchanged; UserError if it is not UTF-8.

    Some of the libraries that open files in a run's folder accept only UTF-8.
    """
    try:
        from_disk(path or "")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: rename it, or use a link to it") from None
    return path


DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Folder that holds the data, or receives the download."
    ),
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
        "--from",
        metavar="RUN",
        callback=_utf8,
        help="Start from the end of phase 1 of this complete run.",
    ),
]
RecipeName = Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else on stdout.")
]
Launcher = Annotated[str, typer.Option(metavar="LINE", help="Command that starts the ranks.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="K=V",
        help="Override a field: refine.epochs=10; an empty value gives it its default",
    ),
]


@app.command()
def train(
    recipe: RecipeName,
    data: DataDir = None,
    out: RunDir = None,
    overrides: Overrides = None,
    phase: Annotated[
        Phase | None,
        typer.Option(help="Run this phase only; other jobs run the others into the same folder."),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --phase refine: the group that all ranks refine."),
    ] = None,
    phase_1_of: PhaseOneOf = None,
    extend: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Continue a complete run for longer: refine.epochs=40"),
    ] = None,
) -> None:
    """Run a recipe on all ranks that the launcher started."""
    control = Control()
    control.listen()
    # Everything that needs no torch is checked first, because torch takes seconds to import.
    world = _world()
    parsed = world.agree(lambda: load_recipe(recipe, overrides or (), data))
    before = None
    if extend:
        before, parsed = (
            parsed,
            world.agree(lambda: load_recipe(recipe, overrides or (), data, extend)),
        )
    folder = out or Path("runs") / on_disk(parsed.name)
    part = world.agree(lambda: chosen_part(phase, group, parsed))
    is_over = phase_1_of is not None or phase_1_is_over(folder, world)
    world.agree(lambda: check_ranks(parsed, world.size, part, is_over))
    from swap_hpc.run import run
    from swap_hpc.run.display import Screen
    from swap_hpc.run.extend import check_extension
    from swap_hpc.study import report

    if before is not None:
        if part or phase_1_of:
            raise UserError("--extend continues a whole run: leave --phase and --from out")
        old = before
        world.agree(lambda: check_extension(old, parsed))
    result = run.train(parsed, folder, world, Screen(), control, STARTED, part, phase_1_of, before)
    if result:
        say(f"\n{report.table(result)}")


def _world() -> Any:
    """Return the team of all ranks; UserError if the launcher and the MPI library do not match."""
    from swap_hpc.parallel.teams import Team

    world = Team.world()
    tell_launcher("preparing")
    return world


def _check_alone(command: str) -> None:
    """Raise a UserError if ranks were started for a command that starts its ranks itself."""
    found = launched()
    # In an interactive step srun counts the tasks that mpirun could start.
    if found and found.size > 1 and found.by != "srun":
        raise UserError(
            f"{found.by} started {found.size} ranks, but {command} starts its ranks itself: "
            f"start swap-hpc {command} alone"
        )


@app.command()
def average(
    run: Annotated[
        Path, typer.Argument(callback=_utf8, help="A run's folder; the run need not be complete.")
    ],
    groups: Annotated[
        str | None, typer.Option(metavar="0,2,3", help="The groups to average.  [default: all]")
    ] = None,
    data: DataDir = None,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Keep only groups that improve it on validation samples."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Average the final weights of a run's groups and refresh batch norm, without training."""
    world = _world()
    chosen = world.agree(lambda: _numbers("--groups", groups) if groups is not None else None)
    from swap_hpc.run import saved
    from swap_hpc.run.greedy import greedy_average

    combine = greedy_average if greedy else saved.average
    _say_result(combine(run, chosen, data, world), as_json)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            callback=_utf8,
            help="A file of weights, of a run or of another program: .safetensors, .pt or .pth.",
        ),
    ],
    data: DataDir = None,
    split: Annotated[
        Literal["test", "validation", "train"], typer.Option(help="The samples to evaluate on.")
    ] = "test",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Names the model and the data, for another program's weights."
        ),
    ] = None,
    overrides: Overrides = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=_utf8, help="Write a CSV file with each sample's outputs."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the metrics and the loss of a saved model on a split of the data."""
    world = _world()
    from swap_hpc.run import saved

    result = saved.evaluate(
        checkpoint, data, world, split, tuple(overrides or ()), recipe, predictions
    )
    _say_result(result, as_json)


def _numbers(option: str, text: str) -> list[int]:
    """Return the integers of a comma-separated option; UserError if it is something else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write the numbers as 0,2,3") from None


def _say_result(result: Any, as_json: bool) -> None:
    """Print what was found, as lines or as one JSON object."""
    if as_json:
        say(json.dumps(_as_object(result), allow_nan=False))
        return
    for note in result.notes:
        say(note)
    figures = [
        text
        for split, found in result.found.items()
        for text in (
            *(f"{split} {name} {with_unit(name, each)}" for name, each in found.metrics.items()),
            f"{split} loss {found.loss:.4f}",
        )
    ]
    say(f"{result.file}: {', '.join(figures)}")
    if result.file.name == "average-greedy.safetensors":
        say(f"groups in it, the best first: {', '.join(map(str, result.members))}")
    say(f"weights_sha256 {result.weights_sha256}")


def _as_object(result: Any) -> dict[str, Any]:
    from swap_hpc.run.lines import figures, without_nan

    content: dict[str, Any] = {"file": from_disk(result.file)}
    if result.members is not None:
        content["groups"] = result.members
    for split, found in result.found.items():
        content |= without_nan(figures(split, found, found.metrics))
    return content | {"weights_sha256": result.weights_sha256, "notes": result.notes}


@app.command()
def landscape(
    run: Annotated[Path, typer.Argument(callback=_utf8, help="A complete run's folder.")],
    points: Annotated[
        int, typer.Option(metavar="N", help="Points along each side of a plane's grid.", min=3)
    ] = 15,
    samples: Annotated[
        int,
        typer.Option(metavar="N", help="Training images, and test images, per point.", min=1),
    ] = 2000,
    data: DataDir = None,
) -> None:
    """Draw train and test error on planes through a run's weights; the ranks share the points."""
    world = _world()
    from swap_hpc.study import landscape as landscapes

    say(f"written: {landscapes.landscape(run, data, points, samples, world, say)}, landscape.json")


@app.command()
def trajectory(
    run: Annotated[
        Path, typer.Argument(callback=_utf8, help="A complete run's folder, with snapshots.")
    ],
    samples: Annotated[
        int, typer.Option(metavar="N", help="Training images per gradient.", min=1)
    ] = 2000,
    data: DataDir = None,
) -> None:
    """Draw the cosine of gradients with the way to the average, and the groups' distances."""
    world = _world()
    from swap_hpc.study import trajectory as trajectories

    say(f"written: {trajectories.trajectory(run, data, samples, world, say)}, trajectory.json")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Explain every field of a recipe, as Markdown.")
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
        raise UserError(f"no recipe {name!r}; choose one of {', '.join(files)}")


@app.command()
def data(
    name: Annotated[DataName, typer.Argument(help="The data set.")],
    directory: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder that receives the download.")
    ] = Path("data"),
) -> None:
    """Download and verify a data set, on a login node ahead of a job."""
    world = _world()
    from swap_hpc.data import download
    from swap_hpc.parallel.grid import first_then_rest

    say(first_then_rest(world, lambda: download(name, directory)))


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="A folder with train/<class>/ and test/<class>/ (and val/<class>/)."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the shards.")],
    samples_per_shard: Annotated[
        int, typer.Option(metavar="N", help="Images per tar file.", min=1)
    ] = 1000,
) -> None:
    """Pack a folder of images into WebDataset shards for DALI; the ranks share the work."""
    world = _world()
    from swap_hpc.data import pack as packing

    number = packing.pack(source, out, samples_per_shard, world, say)
    say(f"{number} shards in {out}: --set data.name=webdataset --data {out}")


@app.command()
def doctor(
    groups: Annotated[
        int, typer.Option(help="Number of groups to divide the ranks into.", min=1)
    ] = 1,
) -> None:
    """Print versions, MPI, Horovod, GPUs and where each rank runs, and diagnose problems."""
    from swap_hpc.parallel.mpi import world_as_seen
    from swap_hpc.run import doctor

    world = world_as_seen()
    lines = doctor.report(world, groups)
    if world.rank == 0:  # not `say`: what is wrong may be what the launcher's variables tell
        print("\n".join(lines), flush=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, complete or not.")],
) -> None:
    """Write a table and figures into each run's folder, as Markdown and as one HTML page."""
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
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", metavar="N", help="Run the table's runs of this seed only; repeatable."
        ),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Explain every field of a study, as Markdown.")
    ] = False,
) -> None:
    """Run all rows of a table, one after the other; a second call runs what is missing."""
    from swap_hpc.study import study as studies
    from swap_hpc.study import table as study_report
    from swap_hpc.study.plan import Plan
    from swap_hpc.study.runner import run_trials

    if page:
        from swap_hpc.study import page as study_page

        say(study_page.page().rstrip())
        return
    if name is None:
        for known in studies.shipped_studies():
            say(f"{known:<18} {studies.load_study(known).title}")
        return
    _check_alone("study")
    folder = out or Path("runs") / Path(name).stem
    loaded = studies.load_study(name)
    if "{network}" in launcher and not loaded.networks:
        raise UserError(f"--launcher {launcher}: the study compares no networks: leave it out")
    studies.check_seeds(loaded, seeds or ())
    networks = tuple(loaded.networks) if "{network}" in launcher else ()
    plan = Plan(loaded, folder, data, tuple(overrides or ()), networks)
    plan.check()
    for _ in run_trials(plan.trials(), launcher, "search"):
        pass
    # The report is written again after each run, so that a study can be read while it goes on.
    for _ in run_trials(plan.reported(seeds or ()), launcher, "run"):
        study_report.write(plan)
    for _ in run_trials(plan.timed(seeds or ()), launcher, "timed run"):
        study_report.write(plan)
    say(f"\n{study_report.text(plan)}\nwritten: {', '.join(map(str, study_report.write(plan)))}")


@app.command()
def plan(
    recipe: RecipeName,
    ranks: Annotated[
        str, typer.Option(metavar="N,N", help="Numbers of ranks to predict.")
    ] = "8,64,512,4096",
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of training samples, if the data set does not set it.", min=1
        ),
    ] = None,
    calibration: Annotated[
        Path, typer.Option(metavar="FILE", help="Measurements that swap-hpc bench scaling wrote.")
    ] = Path("runs/bench/scaling.json"),
    costs: Annotated[
        list[str] | None,
        typer.Option("--cost", metavar="K=V", help="Override a cost: bandwidth=25e9"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict seconds per phase on any number of ranks, and those of small- and large-batch SGD."""
    from swap_hpc.bench import plan as plans

    parsed = load_recipe(recipe, overrides or ())
    numbers = _numbers("--ranks", ranks)
    say(plans.text(parsed, numbers, samples, calibration, costs or ()))


@app.command()
def bench(
    name: Annotated[
        str | None,
        typer.Argument(help="The bench to run, or all.  [default: list the benches]"),
    ] = None,
    recipe: Annotated[
        str, typer.Argument(help="For checkpoint: a shipped recipe's name, or a TOML file.")
    ] = "cifar10-cpu",
    data: DataDir = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the JSON; for checkpoint, the saves.")
    ] = Path("runs/bench"),
    overrides: Overrides = None,
    launcher: Launcher = "mpirun -n {ranks}",
) -> None:
    """Measure parts of the program beside their usual alternatives, in turn within one run."""
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
        _check_alone("bench")
        benches.scale(launcher, out, overrides or (), say)
    elif name == "ranks":
        _check_alone("bench")
        benches.grow(launcher, out, say)
    elif name == "all" or name in benches.BENCHES:
        _check_alone("bench")
        chosen = [*benches.BENCHES] if name == "all" else [name]
        benches.run(chosen, launcher, out / f"{name}.json", say)
    else:
        raise UserError(f"no bench {name!r}; choose one of all, {', '.join(benches.NAMES)}")


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(f"swap_hpc {__version__}" if version else context.get_help())


def _traceback(error: BaseException) -> str:
    """Return a traceback without the frames of the command-line library."""
    trace = traceback.TracebackException.from_exception(error)
    trace.stack = traceback.StackSummary.from_list(
        frame for frame in trace.stack if not re.search(r"/(typer|click)/", frame.filename)
    )
    return "".join(trace.format()).rstrip()


def _print_anything() -> None:
    """Let print escape what it cannot encode, instead of failing.

    A file name may hold bytes that are not UTF-8, and a terminal's encoding may lack characters.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run_command() -> int | None:
    """Run the command that the arguments name, and return its exit code."""
    try:
        code = app(standalone_mode=False)
    except SystemExit as leaving:
        # typer exits like this when any pipe breaks. No command does, so else a user's module did.
        broken_pipe = leaving.__context__
        if not isinstance(broken_pipe, BrokenPipeError):
            fail(3, _traceback(leaving))
        if nobody_reads():
            leave_unheard()
        fail(3, _traceback(broken_pipe))
    if code == 130:  # typer returns this instead of raising KeyboardInterrupt
        raise KeyboardInterrupt
    return code


def main() -> None:
    """Run the command line; an error ends all ranks with one clear line."""
    _print_anything()
    try:
        code = _run_command()
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
        hint = "make setup installs all that is needed"
        fail(2, f"swap-hpc: {error.name} is not installed in this environment: {hint}")
    except KeyboardInterrupt:
        fail(3, "swap-hpc: interrupted")
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's error for a wrong command line
            fail(2, f"swap-hpc: {error.format_message().rstrip('.')} (swap-hpc --help)")
        if isinstance(known := explained(error), UserError):
            fail(2, f"swap-hpc: {known}")
        fail(3, _traceback(error))


if __name__ == "__main__":
    main()
