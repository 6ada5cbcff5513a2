"""The ranks of a job wait together for the owner of a folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from swap_hpc.errors import Stopped
from swap_hpc.parallel.teams import Team
from swap_hpc.run.lock import owning
from swap_hpc.run.owner import this_process
from swap_hpc.run.taking import Rhythm, own_file


@pytest.mark.ranks(2)
def test_a_stop_of_any_rank_ends_the_wait_of_all(world: Team, tmp_path: Path) -> None:
    out = world.broadcast(tmp_path)
    world.first(lambda: own_file(out, None).take(replace(this_process(), host="n1"), None))
    rhythm = Rhythm(standstill=1e6)
    is_last = world.rank == world.size - 1
    with pytest.raises(Stopped), owning(out, None, world, str, rhythm, lambda: is_last):
        pass
    assert [path.name for path in out.iterdir()] == [".owner"]
