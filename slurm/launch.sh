#!/bin/bash
# Sourced by the batch scripts. `launch COMMAND ...` runs it on all of a job's ranks, and puts the job back into the queue where it has to go on.

here=${SWAP_SLURM:-$SLURM_SUBMIT_DIR/slurm}
if [ -f "$here/site.env" ]; then
  # shellcheck source=site.env.example
  . "$here/site.env"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$here/../.venv/bin/activate" ]; then
  . "$here/../.venv/bin/activate"
fi

say() { echo "swap: $*" >&2; }

# as many threads as the job has cores for, whatever Slurm binds them to: then a run repeats
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

case ${SWAP_LAUNCHER:-srun} in
  # Each rank sees all GPUs of its node and takes the one at its local rank. A rank that is lost ends the job's step.
  # Since 22.05 srun has to be told the cores per task again.
  srun) launcher=(srun "--mpi=${SWAP_MPI:-pmix}" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --gpu-bind=none --kill-on-bad-exit=1) ;;
  mpirun) launcher=(mpirun --bind-to none) ;;
  *) say "SWAP_LAUNCHER=$SWAP_LAUNCHER is not known: choose srun or mpirun"; exit 2 ;;
esac
read -ra more <<<"${SWAP_LAUNCHER_ARGS:-}"

# `swap-hpc` says here how far it came; on a file system that the nodes share.
export SWAP_HPC_STATE=$SLURM_SUBMIT_DIR/.swap-$SLURM_JOB_ID.state

launch() {
  local pid code asked told=
  command -v "$1" >/dev/null || { say "no $1 on the PATH: make setup, or name the environment in $here/site.env"; exit 2; }
  rm -f "$SWAP_HPC_STATE"
  "${launcher[@]}" "${more[@]}" "$@" &
  pid=$!
  # Both launchers hand USR1 and USR2 on to the ranks, which save and exit with 75. In the background, because a shell acts on
  # a signal only when no command runs in its foreground.
  trap 'asked=1 told=1; kill -USR1 "$pid"' USR1 TERM
  trap 'asked=1 told=1; kill -USR2 "$pid"' USR2
  while :; do
    asked=
    wait "$pid"; code=$?
    if [ -z "$asked" ] || [ "$code" -le 128 ]; then break; fi  # else a signal ended the wait, and not the launcher
  done
  finish "$code" "$told"
}

# 2 is wrong input and 3 a run that failed: going on would not help. Neither would it where a first start never came to train (a restart may have
# been given a node that is down). All else came from outside: a stop with all saved (75), a rank, a step or a node that was killed.
# Open MPI's mpirun may say 0 where it lost a node.
finish() {
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0} most=${SWAP_RESTARTS:-20} state job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi  # its number may stand for the whole array
  state=$(cat "$SWAP_HPC_STATE" 2>/dev/null); rm -f "$SWAP_HPC_STATE"
  if [ "$code" = 0 ] && [ "$state" = "done" ]; then exit 0; fi
  case $code in 0) code=1 ;; 2|3) exit "$code" ;; esac
  if [ -z "$state$2" ] && [ "$restarts" = 0 ]; then
    say "stopped with code $code before training began"
  elif [ "$(squeue --noheader --jobs="$job" --format=%T)" != RUNNING ]; then
    say "stopped with code $code, as the job was cancelled or requeued"
  elif [ "$restarts" -ge "$most" ]; then
    say "stopped with code $code, and not restarted again after $restarts restarts (SWAP_RESTARTS): submit the same command again to go on"
  else
    say "stopped with code $code: back into the queue, restart $((restarts + 1)) of at most $most"
    scontrol requeue "$job" || say "this cluster does not requeue: submit the same command again to go on"
  fi
  exit "$code"
}
