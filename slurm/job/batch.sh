# Functions of a training job; the file that `python -m slurm render train` writes sources them from
# RUN/slurm/job/. It sets XLSTM_RUN, XLSTM_PYTHON and XLSTM_TASKS_PER_NODE before, and defines
# xlstm_train_step, which becomes the srun of the training step. What is decided, and what is asked
# of Slurm, is `slurm.job.life`; here is what only a shell can do: signals, steps and their order.
# shellcheck shell=bash

XLSTM_EXIT='' XLSTM_ACTION='' XLSTM_WAIT=0 XLSTM_LIFE=0 XLSTM_LIFE_FOLDER='' XLSTM_PORT=''
XLSTM_HEAD='' XLSTM_BURN=-1 XLSTM_TERM='' XLSTM_NODES='' XLSTM_FIT=yes
XLSTM_JOB_END=''

xlstm_say() { printf '%s xlstm: %s\n' "$(date '+%F %T')" "$*"; }

# Asks about this life, and takes the variables that the answer sets: xlstm_ask EVENT [OPTIONS]
# By the copies of the modules, and nothing of the current folder. A TERM waits for the answer.
xlstm_ask() {
  local answer event=$1
  shift
  answer=$(
    trap '' TERM
    PYTHONPATH="$XLSTM_RUN/slurm/job" exec "$XLSTM_PYTHON" -P -m slurm.job.life "$event" "$XLSTM_RUN" \
      --job "$SLURM_JOB_ID" --restart "${SLURM_RESTART_COUNT:-0}" --life "$XLSTM_LIFE" \
      --interrupted "$XLSTM_TERM" "$@"
  ) || {
    xlstm_say "the question '$event' has no answer; the job ends"
    exit 1
  }
  eval "$answer"
}

# Runs a command in the background and waits for it: a trapped signal ends `wait` early.
xlstm_wait() {
  local pid rc=0
  "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid"
    rc=$?
  done
  return "$rc"
}

# What this life runs on, for whoever asks later; written beside the life, which it cannot end.
xlstm_report() {
  {
    date
    git rev-parse HEAD 2>/dev/null && git diff HEAD 2>/dev/null | sha256sum
    "$XLSTM_PYTHON" -m pip freeze 2>/dev/null
    nvidia-smi 2>/dev/null
    nvidia-smi topo -m 2>/dev/null
    scontrol --oneliner show job "$SLURM_JOB_ID"
    env | grep -E '^(SLURM|NCCL|GLOO|TORCH|OMP|MASTER)' | sort
  } >"$XLSTM_LIFE_FOLDER/env.txt" 2>&1 || true
}

# Whether the nodes are fit; xlstm_preflight_step is there where the site wants it.
xlstm_preflight() {
  declare -F xlstm_preflight_step >/dev/null || return 0
  export MASTER_PORT=$XLSTM_PORT XLSTM_NODES
  xlstm_wait xlstm_preflight_step
  xlstm_say "the preflight ended with $?"
  xlstm_ask checked
}

# Copies to the nodes' own disks, where the site wants them.
xlstm_stage() {
  declare -F xlstm_stage_step >/dev/null || return 0
  if xlstm_wait xlstm_stage_step; then
    xlstm_use_stage
  else
    xlstm_say "not every node has its copies; the ranks read what all nodes see"
  fi
}

# See slurm.job.life.step_id_to_reach.
xlstm_burn() {
  local id=-1 tries=0
  while [ "$id" -lt "$XLSTM_BURN" ] && [ "$tries" -lt 300 ]; do
    # The variable is that of the step.
    # shellcheck disable=SC2016
    id=$(srun --nodes=1 --ntasks=1 /bin/sh -c 'echo "$SLURM_STEP_ID"') || id=-1
    tries=$((tries + 1))
  done
}

# Trains until the ranks end, on another port where the first one is taken.
xlstm_train() {
  local tries=1
  while :; do
    export MASTER_PORT=$XLSTM_PORT
    # A signal reaches steps only, and may have come before there was one.
    if [ -n "$XLSTM_FIT" ] && [ ! -e "$XLSTM_RUN/slurm/STOP" ]; then
      xlstm_wait xlstm_train_step
      xlstm_say "the step ended with $?"
    fi
    xlstm_ask end --tries "$tries"
    [ "$XLSTM_ACTION" = retry ] || break
    tries=$((tries + 1))
  done
}

# The nodes' own folder of this job. Not when Slurm is ending the job: no new step starts then.
xlstm_clear_scratch() {
  [ -n "${XLSTM_SCRATCH:-}" ] && [ -z "$XLSTM_TERM" ] || return 0
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 rm -rf -- "$XLSTM_SCRATCH" || true
}

# One life, from the question whether it may begin to what follows its end.
xlstm_life() {
  trap 'XLSTM_TERM=yes' TERM
  xlstm_ask begin
  [ -z "$XLSTM_EXIT" ] || exit "$XLSTM_EXIT"
  export MASTER_ADDR=$XLSTM_HEAD XLSTM_JOB_END
  xlstm_report &
  xlstm_preflight
  [ -z "$XLSTM_FIT" ] || xlstm_stage
  xlstm_burn
  xlstm_train
  [ "$XLSTM_ACTION" != leave ] || exit "$XLSTM_EXIT"  # all the rest belongs to the other life
  xlstm_clear_scratch
  xlstm_ask follow --action "$XLSTM_ACTION" --wait "$XLSTM_WAIT"
  exit "$XLSTM_EXIT"
}
