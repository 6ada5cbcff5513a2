"""The columns of srun in the table of exit codes, for this environment's MPI.

One job starts one step after the other.
"""

from pathlib import Path

import pytest
from cluster_of_two import MPI_TYPE, Cluster
from launch import codes, exit_codes, wait_for

pytestmark = pytest.mark.mpi

# Each line of the output: what happened, and srun's code.
SCRIPT = r"""#!/bin/bash
step() {  # step NAME SIGNAL TO [FIELDS]
  local out=$PWD/$1
  srun -n2 --mpi=$SWAP_MPI --kill-on-bad-exit=1 swap-hpc train digits \
    --set large_batch.epochs=2 --set model.width=4 --set refine.epochs=10000 --set "$4" \
    --out "$out" >"$out.txt" 2>&1 &
  local srun=$! ranks
  if [ "$3" != nobody ]; then
    # until both ranks refine: the first one groups 0 and 1, the second one groups 2 and 3
    until compgen -G "$out/checkpoints/group-000*" >/dev/null &&
      compgen -G "$out/checkpoints/group-002*" >/dev/null; do sleep 0.2; done
    ranks=$(pgrep -f "python.* $out\$")
    case $3 in
      launcher) kill "-$2" $srun ;;
      all) kill "-$2" $ranks ;;
      one) kill "-$2" ${ranks##*$'\n'} ;;
    esac
  fi
  wait $srun
  echo "$1: $?"
}
step all TERM all seed=0
step usr1 USR1 launcher seed=0
step usr2 USR2 launcher seed=0
step term TERM launcher seed=0
step rank KILL one seed=0
step wrong - nobody grups=3
step diverged - nobody large_batch.learning_rate=1e30
echo end
"""

ROWS = {
    "all": "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to all ranks",
    "usr1": "SIGUSR1 to the launcher",
    "usr2": "SIGUSR2 to the launcher",
    "term": "SIGTERM or SIGINT to the launcher",
    "rank": "a rank is killed",
    "wrong": "wrong input",
    "diverged": "a full disk; a loss or a weight that is not finite",
}


def test_sruns_codes_are_those_of_the_table(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT)
    output = tmp_path / "job.out"
    options = ("--nodes=2", "--ntasks-per-node=1", f"--output={output}")
    cluster.run("sbatch", *options, "job.sh", cwd=tmp_path)
    wait_for(lambda: output.exists() and "end\n" in output.read_text(), "end of the job")
    lines = output.read_text().splitlines()
    found = dict(line.split(": ") for line in lines if line.partition(":")[0] in ROWS)
    assert found.keys() == ROWS.keys()
    table = exit_codes(f"`srun --mpi={MPI_TYPE}`")
    unexpected = {
        name: code for name, code in found.items() if int(code) not in codes(table[ROWS[name]])
    }
    assert unexpected == {}
    for name, row in ROWS.items():
        printed = (tmp_path / f"{name}.txt").read_text()
        saved = "swap-hpc: stopped on request, all is saved" in printed
        assert saved == ("all is saved" in table[row]), name
