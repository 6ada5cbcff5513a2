"""A job that races others for folders: cheap, since it loads neither torch nor MPI.

    python racer.py

Each line on its input is a JSON object: the `folder` to take as soon as the file GATE appears in
it; the fields of an owner that this job shows (`host`, `job`, `restarts`); the `group` that it
refines, or null; `hold`, the seconds for which it keeps the folder, or null: until the next line;
and `patience`, the seconds for which it waits for a living owner. It prints "ready", then "owner"
or the line with which it was refused.
"""

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from swap_hpc.errors import UserError
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.run.owner import this_process
from swap_hpc.run.taking import Rhythm, Taking

STANDSTILL = 0.3  # seconds without a heartbeat after which an owner on another host is dead


def race(
    folder: Path, owner: dict[str, Any], group: int | None, hold: float | None, patience: float
) -> None:
    """Try to take a folder, and give it back."""
    me = replace(this_process(), **owner)
    part = None if group is None else refinement_of(group)
    rhythm = Rhythm(standstill=STANDSTILL, patience=patience)
    print("ready", flush=True)
    while not (folder / "GATE").exists():
        pass  # a sleep would spread the starts
    time.sleep(random.choice((0.0, 0.001 * random.random())))
    try:
        file = Taking(folder, part, me, rhythm, say=str).take()
    except UserError as refused:
        print(refused, flush=True)
        return
    working = folder / f"working-{group}"
    working.touch(exist_ok=False)  # fails where another owner works
    print("owner", flush=True)
    if hold is None:
        sys.stdin.readline()
    else:
        time.sleep(hold)
    working.unlink()
    file.release(me)


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        given: dict[str, Any] = json.loads(line)
        race(Path(given.pop("folder")), **given)


if __name__ == "__main__":
    main()
