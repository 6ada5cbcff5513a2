"""The commands; errors to one clear line; exit codes.

0: done. 2: the input is wrong. 3: the run failed. One rank speaks for all.
"""

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from swap_hpc import __version__
from swap_hpc.errors import RunError, UserError
from swap_hpc.launcher import launched
from swap_hpc.recipe import DataName

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Stochastic Weight Averaging in Parallel.",
)

DataDir = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder with the data, or to download it to.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    data: DataDir = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder.  [default: runs/<recipe name>]")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Override a field: refine.epochs=10")] = None,
) -> None:
    """Run a recipe on all ranks that the launcher started."""
    from rich.console import Console

    from swap_hpc import ranks
    from swap_hpc.recipe import check_ranks, load_recipe

    world = ranks.Team.world()
    if mismatch := ranks.launcher_mismatch(world):
        raise UserError(mismatch)
    parsed = world.agree(lambda: load_recipe(recipe, overrides or (), data))
    world.agree(lambda: check_ranks(parsed, world.size))  # before torch, which takes seconds to import
    from swap_hpc import report, run

    result = run.train(parsed, out or Path("runs") / parsed.name, world, Console(), STARTED)
    _say(f"\n{report.table(result)}")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this one.")] = None) -> None:
    """List the shipped recipes, or show one."""
    from swap_hpc.recipe import shipped_recipes

    files = shipped_recipes()
    if name is None:
        for known, file in files.items():
            _say(f"{known:<12} {file.read_text().splitlines()[0].lstrip('# ')}")
    elif name in files:
        _say(files[name].read_text().rstrip())
    else:
        raise UserError(f"no recipe {name!r}; there are {', '.join(files)}")


@app.command()
def data(
    name: Annotated[DataName, typer.Argument(help="The data set.")],
    directory: Annotated[Path, typer.Option("--data", metavar="DIR", help="Where to.")] = Path("data"),
) -> None:
    """Download a data set ahead of a job, on a login node, and verify it."""
    from swap_hpc.data import download
    from swap_hpc.ranks import Team, first_then_rest

    _say(first_then_rest(Team.world(), lambda: download(name, directory)))


@app.command()
def doctor(groups: Annotated[int, typer.Option(help="Groups of the grid to look at.", min=1)] = 1) -> None:
    """Print versions, MPI, Horovod, GPUs, where each rank runs, and what is wrong."""
    from swap_hpc import doctor
    from swap_hpc.ranks import Team

    _say("\n".join(doctor.report(Team.world(), groups)))


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="Folders of complete runs.")]) -> None:
    """Write a Markdown table and figures into runs' folders."""
    from swap_hpc import report

    for folder in runs:
        _say(f"{report.table(report.load_result(folder))}\n")
        _say(f"written: {report.write_report(folder)}, {folder / 'curves.png'}")


@app.callback(invoke_without_command=True)
def _options(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if context.invoked_subcommand is None:
        _say(f"swap_hpc {__version__}" if version else context.get_help())


STARTED = time.perf_counter()


def main() -> None:
    """Runs the command line; errors end in one clear line, from one rank."""
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _fail(2, f"swap-hpc: {error}", error.said_elsewhere)
    except RunError as error:
        _fail(3, f"swap-hpc: {error}", error.said_elsewhere)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("mpi4py", "nvidia", "torch", "torchvision"):
            _fail(3, traceback.format_exc().rstrip())
        _fail(2, f"swap-hpc: {error.name} is not installed in this environment: make setup installs all that is needed")
    except KeyboardInterrupt:
        _fail(3, "swap-hpc: interrupted")
    except Exception as error:
        if type(error).__name__ == "Abort":  # what typer makes of a KeyboardInterrupt
            _fail(3, "swap-hpc: interrupted")
        if hasattr(error, "format_message"):  # the command line itself is wrong
            _fail(2, f"swap-hpc: {error.format_message().rstrip('.')} (swap-hpc --help)")
        _fail(3, traceback.format_exc().rstrip())


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def _rank() -> int:
    """This process's rank: by MPI where it was started; else by the launcher's word, so that a login node needs no MPI."""
    told = launched()
    if "swap_hpc.ranks" in sys.modules:
        from swap_hpc.ranks import Team

        world = Team.world()
        if world.size > 1 or told is None:
            return world.rank
    return told.rank if told else 0


def _fail(code: int, text: str, said_elsewhere: bool = False) -> NoReturn:
    """Says `text`, from one rank, and ends all ranks, also those that know of no error.

    Where all ranks fail alike the first one speaks and ends the others, which wait for that meanwhile.
    """
    rank = _rank()
    time.sleep(10 if said_elsewhere else 1 + 0.05 * min(rank, 40) if rank else 0)
    alone = "swap_hpc.ranks" not in sys.modules
    if not alone:
        from swap_hpc import ranks

        alone = ranks.Team.world().size == 1
    if not said_elsewhere and (rank == 0 or not alone):
        print(text, file=sys.stderr, flush=True)
    if not alone:
        time.sleep(0.2)  # the launcher may drop what it has not forwarded yet
        ranks.abort(code)
    sys.exit(code)
