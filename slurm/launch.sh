#!/bin/bash
# Sourced by the batch scripts. `launch COMMAND ...` runs it on all of a job's ranks, and puts the job back into the queue where it has to go on.

say() { echo "swap: $*" >&2; }

# Until ranks run there is nobody to hand a signal on to; it is remembered.
told=
trap 'told=1' USR1 USR2 TERM

here=${SWAP_SLURM:-$SLURM_SUBMIT_DIR/slurm}
if [ -f "$here/site.env" ]; then
  # shellcheck source=site.env.example
  . "$here/site.env"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$here/../.venv/bin/activate" ]; then
  . "$here/../.venv/bin/activate"
fi

# as many threads as the job has cores for, whatever Slurm binds them to: then a run repeats
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

case ${SWAP_LAUNCHER:-srun} in
  # Each rank is shown all of the job's GPUs on its node (--gpu-bind=none would show it no list at all) and takes the one at its local
  # rank. A rank that is lost ends the job's step.
  # Since 22.05 srun has to be told the cores per task again.
  srun) launcher=(srun "--mpi=${SWAP_MPI:-pmix}" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1) ;;
  mpirun) launcher=(mpirun --bind-to none) ;;
  *) say "SWAP_LAUNCHER=$SWAP_LAUNCHER is not known: choose srun or mpirun"; exit 2 ;;
esac
# Words; quotes hold those with spaces together.
if ! words=$(xargs -r printf '%s\n' <<<"${SWAP_LAUNCHER_ARGS:-}"); then
  say "SWAP_LAUNCHER_ARGS=$SWAP_LAUNCHER_ARGS has a quote without its other one"
  exit 2
fi
more=()
[ -z "$words" ] || mapfile -t more <<<"$words"
for count in SWAP_RESTARTS SWAP_RETRIES; do
  case ${!count:-0} in *[!0-9]*) say "$count=${!count} is no number"; exit 2 ;; esac
done
ask=${SWAP_SIGNAL:-USR1}

# Here the first rank says how far it came ("training", "stopped", "done"), and the one that fails adds a line ("failed with 3"), where they
# can reach the file. The other file counts how often ranks were lost.
export SWAP_HPC_STATE=$SLURM_SUBMIT_DIR/.swap-$SLURM_JOB_ID.state
losses=$SLURM_SUBMIT_DIR/.swap-$SLURM_JOB_ID.losses

launch() {
  local pid code asked
  case ${SWAP_LAUNCHER_ARGS:-} in
    *container*) ;;  # the program is in there
    *) command -v "$1" >/dev/null || { say "no $1 on the PATH: make setup, or name the environment in $here/site.env"; exit 2; } ;;
  esac
  echo started >"$SWAP_HPC_STATE"
  "${launcher[@]}" "${more[@]}" "$@" &
  pid=$!
  # Whatever the job is sent, the ranks get USR1, which every launcher hands on: they save and exit with 75. (MPICH's mpirun ends without a
  # save at USR2, and may say 0 after a stop.) In the background, because a shell acts on a signal only when no command runs in its foreground.
  trap 'asked=1 told=1; kill -"$ask" "$pid" 2>/dev/null' USR1 USR2 TERM
  if [ -n "$told" ]; then kill -"$ask" "$pid"; fi  # told while it was being started
  while :; do
    asked=
    wait "$pid"; code=$?
    if [ -z "$asked" ] || [ "$code" -le 128 ]; then break; fi  # else a signal ended the wait, and not the launcher
  done
  trap '' USR1 USR2 TERM
  finish "$code" "$(cat "$SWAP_HPC_STATE")"
}

# The job's state by Slurm's word; empty where the controller does not answer.
job_state() {
  local try
  for try in 1 2 3; do
    if squeue --noheader --jobs="$1" --format=%T 2>/dev/null; then return; fi
    sleep $((try * 5))
  done
}

# finish CODE STATE. Wrong input (2) is not mended by a restart, nor a first start that never came to train. Where somebody asked for a stop all is
# saved (75). All else is a loss: a rank, a step, a node, or a run that failed (3), since a lost neighbour can look like that; it is tried again a few times.
finish() {
  local code=$1 state=${2%%$'\n'*} restarts=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID now lost
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi  # its number may stand for the whole array
  if [ "$code" = 0 ] && [ "$state" = training ]; then code=1; fi  # mpirun may say 0 where it lost a node
  case $2 in
    stopped*) code=75 ;;  # srun may kill a rank that is slower to leave than the others, and says 137
    *"failed with "*) code=${2##*failed with } ;;  # srun --mpi=pmi2 says 137 where a rank ends the others
  esac
  if [ "$code" = 75 ]; then told=1; fi
  lost=$(cat "$losses" 2>/dev/null || echo 0)
  rm -f "$SWAP_HPC_STATE" "$losses"
  case $code in 0|2) exit "$code" ;; esac

  now=$(job_state "$job")
  if [ -n "$now" ] && [ "$now" != RUNNING ]; then
    say "stopped with code $code; the job is $now"
  elif [ -z "$told" ] && [ "$state" = started ] && [ "$restarts" = 0 ]; then
    say "stopped with code $code before training began"
  elif [ "$restarts" -ge "${SWAP_RESTARTS:-50}" ]; then
    say "stopped with code $code, and not restarted again after $restarts restarts (SWAP_RESTARTS): submit the same command again to go on"
  elif [ -z "$told" ] && [ "$lost" -ge "${SWAP_RETRIES:-5}" ]; then
    say "stopped with code $code, and not tried again after $lost times (SWAP_RETRIES): see above why; submit the same command again to go on"
  else
    if [ -z "$told" ]; then echo $((lost + 1)) >"$losses"; fi
    say "stopped with code $code: back into the queue"
    scontrol requeue "$job" || say "this cluster does not requeue: submit the same command again to go on"
  fi
  exit "$code"
}
