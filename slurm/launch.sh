#!/bin/bash
# Sourced by the batch scripts. `launch COMMAND ...` runs a command on all ranks of the job, and puts the job back into
# the queue if the run has to continue.

say() { echo "swap: $*" >&2; }

# Before the ranks run, there is nobody to forward a signal to: remember it.
stop_asked=
trap 'stop_asked=1' USR1 USR2 TERM

here=${SWAP_SLURM:-$SLURM_SUBMIT_DIR/slurm}
if [ -f "$here/site.env" ]; then
  # shellcheck source=site.env.example
  . "$here/site.env"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$here/../.venv/bin/activate" ]; then
  . "$here/../.venv/bin/activate"
fi

# The number of threads comes from the job's cores per task and not from Slurm's binding, so that runs are repeatable.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# notice_lost_hosts: let mpirun ask its connections for a sign of life, so that it notices within a minute that a node is
# cut off from the network. TCP by itself would take a quarter of an hour. PRTE is Open MPI 5's, OMPI is Open MPI 4's. What
# the environment sets already stays.
notice_lost_hosts() {
  local family setting name
  for family in PRTE OMPI; do
    for setting in time=20 intvl=10 probes=4; do
      name=${family}_MCA_oob_tcp_keepalive_${setting%=*}
      export "$name=${!name:-${setting#*=}}"
    done
  done
}

case ${SWAP_LAUNCHER:-srun} in
  # Each rank sees all GPUs of the job on its node and takes the one at its local rank. (With --gpu-bind=none it would get
  # no list of them at all.) --kill-on-bad-exit: a lost rank ends the job step. --cpus-per-task: since Slurm 22.05 srun no
  # longer inherits it from the job.
  srun) launcher=(srun "--mpi=${SWAP_MPI:-pmix}" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1) ;;
  mpirun) launcher=(mpirun --bind-to none); notice_lost_hosts ;;
  *) say "SWAP_LAUNCHER=$SWAP_LAUNCHER is not known: choose srun or mpirun"; exit 2 ;;
esac
# Split SWAP_LAUNCHER_ARGS into words; quotes hold words with spaces together.
if ! words=$(xargs -r printf '%s\n' <<<"${SWAP_LAUNCHER_ARGS:-}"); then
  say "SWAP_LAUNCHER_ARGS=$SWAP_LAUNCHER_ARGS has an unmatched quote: close or remove it"
  exit 2
fi
more=()
[ -z "$words" ] || mapfile -t more <<<"$words"
for count in SWAP_RESTARTS SWAP_RETRIES; do
  case ${!count:-0} in *[!0-9]*) say "$count=${!count} is not a number: set it to 0 or more"; exit 2 ;; esac
done
signal=${SWAP_SIGNAL:-USR1}

# SWAP_HPC_STATE: the first rank writes its progress ("preparing", "training", "stopped", "done"), and a rank that fails
# adds a line ("failed with 3"), if they can reach the file. The file .losses counts the restarts after lost ranks.
export SWAP_HPC_STATE=$SLURM_SUBMIT_DIR/.swap-$SLURM_JOB_ID.state
losses=$SLURM_SUBMIT_DIR/.swap-$SLURM_JOB_ID.losses

launch() {
  local pid code interrupted
  case ${SWAP_LAUNCHER_ARGS:-} in
    *container*) ;;  # the command is inside the container
    *) command -v "$1" >/dev/null || { say "no $1 on the PATH: make setup, or name the environment in $here/site.env"; exit 2; } ;;
  esac
  echo started >"$SWAP_HPC_STATE"
  # In the background, because a shell handles a signal only when no command runs in its foreground.
  "${launcher[@]}" "${more[@]}" "$@" &
  pid=$!
  # Whatever signal the job gets, the ranks get USR1, which every launcher forwards; they save and exit with 75. (At USR2,
  # MPICH's mpirun ends before they have saved. It may also exit with 0 after a stop.)
  trap 'interrupted=1 stop_asked=1; kill -"$signal" "$pid" 2>/dev/null' USR1 USR2 TERM
  if [ -n "$stop_asked" ]; then kill -"$signal" "$pid"; fi  # the signal came while the ranks were being started
  while :; do
    interrupted=
    wait "$pid"; code=$?
    # A code above 128 after a signal means that the signal ended `wait`, while the launcher still runs.
    if [ -z "$interrupted" ] || [ "$code" -le 128 ]; then break; fi
  done
  trap '' USR1 USR2 TERM
  finish "$code" "$(cat "$SWAP_HPC_STATE")"
}

# job_state JOB: the job's state as Slurm reports it; nothing if the controller does not answer.
job_state() {
  local try
  for try in 1 2 3; do
    if squeue --noheader --jobs="$1" --format=%T 2>/dev/null; then return; fi
    sleep $((try * 5))
  done
}

# finish CODE STATE: end the job, or put it back into the queue.
#   0, 2                      The run is complete, or its input is wrong: a restart would change nothing.
#   75                        The run was asked to stop and is saved: restart.
#   any other code            A rank, a job step or a node was lost, or the run failed (3), which may be the consequence of
#                             a loss elsewhere: restart a few times. A first start that fails before training is not
#                             restarted, unless mpirun returns 0 and no rank told of a failure: a node was lost then.
finish() {
  local code=$1 state=${2%%$'\n'*} restarts=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID now lost
  # In an array, the number of a task's job may stand for the whole array.
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  # mpirun may exit with 0 after it lost a node
  case $code$2 in 0preparing|0training) code=1 state=training ;; esac
  case $2 in
    stopped*) code=75 ;;  # srun may kill a rank that leaves later than the others, and exits with 137
    *"failed with "*) code=${2##*failed with } ;;  # srun --mpi=pmi2 exits with 137 if a rank ends the others
  esac
  if [ "$code" = 75 ]; then stop_asked=1; fi
  lost=$(cat "$losses" 2>/dev/null || echo 0)
  rm -f "$SWAP_HPC_STATE" "$losses"
  case $code in 0|2) exit "$code" ;; esac

  now=$(job_state "$job")
  if [ -n "$now" ] && [ "$now" != RUNNING ]; then
    say "stopped with code $code; the job is $now"
  elif [ -z "$stop_asked" ] && [[ $state = started || $state = preparing ]] && [ "$restarts" = 0 ]; then
    say "stopped with code $code before training began"
  elif [ "$restarts" -ge "${SWAP_RESTARTS:-50}" ]; then
    say "stopped with code $code; SWAP_RESTARTS=${SWAP_RESTARTS:-50} allows no further restart:" \
        "submit the same command again to continue"
  elif [ -z "$stop_asked" ] && [ "$lost" -ge "${SWAP_RETRIES:-5}" ]; then
    say "stopped with code $code; SWAP_RETRIES=${SWAP_RETRIES:-5} allows no further retry:" \
        "see the reason above, then submit the same command again to continue"
  else
    if [ -z "$stop_asked" ]; then echo $((lost + 1)) >"$losses"; fi
    say "stopped with code $code: back into the queue"
    scontrol requeue "$job" || say "this cluster does not requeue: submit the same command again to continue"
  fi
  exit "$code"
}
