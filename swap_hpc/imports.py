"""What a recipe names by import path."""

import importlib
import os
import sys
from typing import Any

from swap_hpc.errors import UserError


def imported(path: str, what: str) -> Any:
    """The object at "package.module:name"; modules of the folder that the job was started in are found, too. Raises UserError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what} {path} cannot be imported ({error}): is it in this folder, or on PYTHONPATH?") from None
