"""Functions that a recipe names by import path, and the errors that they raise."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from swap_hpc.errors import RunError, UserError, explained
from swap_hpc.recipe.wording import shortened

PACKAGE = os.path.dirname(os.path.dirname(__file__))


def imported(path: str, what: str) -> Callable[..., Any]:
    """Import a function. Modules in the folder that the job was started in are found, too.

    Args:
        path: "package.module:function".
        what: What the recipe names with it, for messages: "the loss".

    Raises:
        UserError: The path is malformed, its module fails, or it is not a function.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", path):
        raise UserError(f'{what} {path}: write it as "package.module:function"')
    name, _, function = path.partition(":")
    module = _import(name, f"{what} {path}")
    if not hasattr(module, function):
        there = ", ".join(_public_functions(module)) or "no function"
        raise UserError(f"{what} {path}: {name} has no {function}; it has {there}")
    found = getattr(module, function)
    if not callable(found):
        raise UserError(f"{what} {path} is a {type(found).__name__}: a function is needed")
    return found


def _import(name: str, subject: str) -> ModuleType:
    """Import a module of the user's; UserError, which begins with `subject`, if it fails."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and _is_part_of(error.name, name):
            raise UserError(
                f"{subject} cannot be imported ({error}): is it in this folder, or on PYTHONPATH?"
            ) from None
        raise UserError(f"{subject} cannot be imported: {_reason(error)}") from None


def _is_part_of(missing: str | None, module: str) -> bool:
    """Return whether `missing` is `module` or a package that holds it, not one that it imports."""
    return bool(missing) and f"{module}.".startswith(f"{missing}.")


def _public_functions(module: ModuleType) -> list[str]:
    """Return the names of the functions that `module` defines itself, and of its metrics."""
    own = (
        name
        for name, value in vars(module).items()
        if callable(value)
        and (
            getattr(value, "__module__", None) == module.__name__
            or type(value).__module__.startswith("swap_hpc.")
        )
    )
    return [name for name in own if not name.startswith("_")]


@contextmanager
def in_one_line(what: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Turn any error of a user's code into one of one line, which begins with `what`.

    The package's own errors pass, and those of a GPU whose memory is full.

    Args:
        what: what fails.
        kind: `UserError` before training; `RunError` where a restart may go well.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | RunError) or explained(error) is not error:
            raise
        raise kind(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return an error's type, message and place in one line."""
    text = str(error)
    if "Original Traceback" in text:  # of a process that loads data for torch's DataLoader
        places = re.findall(r'File "(.+)", line (\d+)', text)
        message = text.rstrip().splitlines()[-1]
        return shortened(message, 400) + _last_place([(file, int(line)) for file, line in places])
    return shortened(f"{type(error).__name__}: {text}", 400) + place_of(error)


def place_of(error: BaseException) -> str:
    """Return where a user's module failed, " (nets.py, line 3)", or "" if that is unknown."""
    if isinstance(error, SyntaxError):
        return ""  # its message names the place
    trace, places = error.__traceback__, []
    while trace:
        places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return _last_place(places)


def _last_place(trace: list[tuple[str, int]]) -> str:
    places = [
        place for place in trace if not place[0].startswith(PACKAGE) and "importlib" not in place[0]
    ]
    # The line in the user's code that called a library helps more than one inside the library.
    own = [place for place in places if "site-packages" not in place[0]] or places
    return f" ({os.path.basename(own[-1][0])}, line {own[-1][1]})" if own else ""
