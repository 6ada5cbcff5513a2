"""What a recipe names by import path."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from swap_hpc.errors import UserError

PACKAGE = os.path.dirname(os.path.dirname(__file__))


def imported(path: str, what: str) -> Callable[..., Any]:
    """The function at "package.module:name"; modules of the folder that the job was started in are found, too. Raises UserError."""
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", path):
        raise UserError(f'{what} {path}: write it as "package.module:function"')
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        home = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{module}.".startswith(f"{error.name}.")
        ):
            raise UserError(
                f"{what} {path} cannot be imported ({error}): is it in this folder, or on PYTHONPATH?"
            ) from None
        raise UserError(
            f"{what} {path} cannot be imported: {type(error).__name__}: {error}{place_of(error)}"
        ) from None
    if not hasattr(home, name):
        own = (
            each
            for each, value in vars(home).items()
            if callable(value) and getattr(value, "__module__", None) == module
        )
        there = [each for each in own if not each.startswith("_")]
        raise UserError(
            f"{what} {path}: {module} has no {name}; it has {', '.join(there) or 'no function'}"
        )
    found = getattr(home, name)
    if not callable(found):
        raise UserError(f"{what} {path} is a {type(found).__name__}: a function is needed")
    return found


def place_of(error: BaseException) -> str:
    """Where a user's own module failed, as far as that is known: " (nets.py, line 3)"."""
    if isinstance(error, SyntaxError):
        return ""  # its text says it
    trace, places = error.__traceback__, []
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(PACKAGE) and "importlib" not in file:
            places.append((file, trace.tb_lineno))
        trace = trace.tb_next
    # where the user's code called a library rather than inside the library
    own = [place for place in places if "site-packages" not in place[0]] or places
    return f" ({os.path.basename(own[-1][0])}, line {own[-1][1]})" if own else ""
