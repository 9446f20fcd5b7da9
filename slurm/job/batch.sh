# Functions of a training job; the file that `python -m slurm render train` writes sources them from
# RUN/slurm/job/. It sets XLSTM_RUN, XLSTM_PYTHON and XLSTM_TASKS_PER_NODE before, and defines
# xlstm_train_step, which becomes the srun of the training step.
# shellcheck shell=bash

XLSTM_EXIT='' XLSTM_REASON='' XLSTM_ACTION='' XLSTM_MODE='' XLSTM_EXCLUDE='' XLSTM_WAIT=0
XLSTM_LIFE='' XLSTM_LIFE_FOLDER='' XLSTM_PORT='' XLSTM_BURN=-1 XLSTM_SUCCESSOR='' XLSTM_TERM=''
XLSTM_NODES='' XLSTM_FIT=yes XLSTM_STAGED=()

xlstm_say() { printf '%s xlstm: %s\n' "$(date '+%F %T')" "$*"; }

xlstm_die() {
  xlstm_say "$*"
  exit 1
}

# The decisions, with the copies of their modules and nothing of the current folder.
xlstm_ask() { PYTHONPATH="$XLSTM_RUN/slurm/job" "$XLSTM_PYTHON" -P -m slurm.job.life "$@"; }

# Nodes of the list that this cluster knows: one unknown name makes Slurm refuse the whole list.
xlstm_known() {
  sinfo --noheader --Node --format=%N | sort -u | grep -Fx -f <(tr ',' '\n' <<<"$1") | paste -sd,
}

xlstm_begin() {
  local nodes running said
  # Fails loudly: without the names every node would be a world of its own.
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || xlstm_die "scontrol does not answer"
  MASTER_ADDR=${nodes%%$'\n'*}
  running=$(squeue --noheader --user="$(id -un)" --states=RUNNING --format=%A || true)
  said=$(xlstm_ask begin "$XLSTM_RUN" --job "$SLURM_JOB_ID" --nodes "$nodes" \
    --restart "${SLURM_RESTART_COUNT:-0}" --running "$running") || xlstm_die "no life begins"
  eval "$said"
  if [ -n "$XLSTM_EXIT" ]; then
    xlstm_say "nothing to do: $XLSTM_REASON"
    exit "$XLSTM_EXIT"
  fi
  xlstm_say "life $XLSTM_LIFE on ${nodes//$'\n'/ }"
  export MASTER_ADDR
}

# In `chain` mode the next job waits from now on, so that it is there whatever ends this one.
xlstm_chain() {
  [ "$1" = chain ] || return 0
  xlstm_submit --dependency=singleton
}

# Submits the run's file again, and notes the number of the job.
xlstm_submit() {
  local exclude said
  exclude=$(xlstm_known "$XLSTM_EXCLUDE")
  said=$(sbatch --parsable ${exclude:+"--exclude=$exclude"} "$@" "$XLSTM_RUN/slurm/train.sbatch" 2>&1)
  if [[ $said =~ ^[0-9]+ ]]; then
    XLSTM_SUCCESSOR=${BASH_REMATCH[0]}
    xlstm_ask submitted "$XLSTM_RUN" --job "$XLSTM_SUCCESSOR"
    xlstm_say "the next job is $XLSTM_SUCCESSOR"
  else
    xlstm_say "no next job: $said"
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
  local said
  declare -F xlstm_preflight_step >/dev/null || return 0
  export MASTER_PORT=$XLSTM_PORT XLSTM_NODES
  xlstm_wait xlstm_preflight_step
  xlstm_say "the preflight ended with $?"
  said=$(xlstm_ask checked "$XLSTM_RUN" --life "$XLSTM_LIFE" --interrupted "$XLSTM_TERM") || exit 1
  eval "$said"
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

xlstm_requeue() {
  local exclude said
  if [ -n "$XLSTM_TERM" ]; then
    xlstm_after_term
  fi
  if [ -n "$XLSTM_SUCCESSOR" ]; then
    [ "$XLSTM_WAIT" = 0 ] || scontrol update JobId="$XLSTM_SUCCESSOR" StartTime="now+$XLSTM_WAIT"
    exclude=$(xlstm_known "$XLSTM_EXCLUDE")
    [ -z "$exclude" ] || scontrol update JobId="$XLSTM_SUCCESSOR" ExcNodeList="$exclude"
    exit "$XLSTM_EXIT"
  fi
  [ "$XLSTM_MODE" != never ] || exit "$XLSTM_EXIT"
  trap '' TERM  # requeuehold ends this script; there are KillWait seconds for the rest
  exclude=$(xlstm_known "$XLSTM_EXCLUDE")
  if [ -n "$exclude" ] || [ "$XLSTM_WAIT" != 0 ]; then
    # A running job's list of excluded nodes cannot be changed; that of a held one can.
    if said=$(scontrol requeuehold "$SLURM_JOB_ID" 2>&1); then
      [ -z "$exclude" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$exclude"
      [ "$XLSTM_WAIT" = 0 ] || scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$XLSTM_WAIT"
      scontrol release "$SLURM_JOB_ID"
      exit "$XLSTM_EXIT"
    fi
  elif said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
    exit "$XLSTM_EXIT"
  fi
  # The site does not allow it: a new job, which waits for the end of this one.
  xlstm_say "no requeue: $said"
  xlstm_submit --dependency="afterany:$SLURM_JOB_ID" --begin="now+$XLSTM_WAIT"
  exit "$XLSTM_EXIT"
}

# Slurm is ending this job. It requeues it itself, or a person has cancelled it, or the job has met
# its end and goes on as a new one.
xlstm_after_term() {
  local restarts
  restarts=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oE 'Restarts=[0-9]+' | cut -d= -f2)
  if [ "$restarts" != "${SLURM_RESTART_COUNT:-0}" ]; then
    xlstm_say "Slurm has requeued the job itself"
    exit "$XLSTM_EXIT"
  fi
  # Only this line of the job's output tells a time limit or a preemption from a cancellation. The
  # lives before this one have left theirs in the same file.
  if ! sed -n "/xlstm: life $XLSTM_LIFE on/,\$p" "$XLSTM_RUN/slurm/$SLURM_JOB_ID.out" |
    grep -q "JOB $SLURM_JOB_ID ON .* DUE TO"; then
    xlstm_say "the job was cancelled; python -m slurm resume goes on"
    [ -z "$XLSTM_SUCCESSOR" ] || scancel "$XLSTM_SUCCESSOR"
    exit "$XLSTM_EXIT"
  fi
}

# The nodes' own folder of this job. Not when Slurm is ending the job: no new step starts then.
xlstm_clear_scratch() {
  [ -n "${XLSTM_SCRATCH:-}" ] && [ -z "$XLSTM_TERM" ] || return 0
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 rm -rf -- "$XLSTM_SCRATCH" || true
}

# One life, from the question whether it may begin to what follows its end.
xlstm_life() {
  local said tries=1
  trap 'XLSTM_TERM=yes' TERM
  xlstm_begin
  xlstm_chain "$1"
  xlstm_report &
  xlstm_preflight
  [ -z "$XLSTM_FIT" ] || xlstm_stage
  xlstm_burn
  while :; do
    export MASTER_PORT=$XLSTM_PORT
    # A signal reaches steps only, and may have come before there was one.
    if [ -n "$XLSTM_FIT" ] && [ ! -e "$XLSTM_RUN/slurm/STOP" ]; then
      xlstm_wait xlstm_train_step
      xlstm_say "the step ended with $?"
    fi
    said=$(xlstm_ask end "$XLSTM_RUN" --life "$XLSTM_LIFE" --tries "$tries") || exit 1
    eval "$said"
    xlstm_say "$XLSTM_ACTION: $XLSTM_REASON"
    [ "$XLSTM_ACTION" = retry ] || break
    tries=$((tries + 1))
  done
  [ "$XLSTM_ACTION" != leave ] || exit "$XLSTM_EXIT"  # all the rest belongs to the other life
  xlstm_clear_scratch
  if [ "$XLSTM_ACTION" = requeue ]; then
    xlstm_requeue
  fi
  # By its number, never by its name, which other jobs may have too.
  [ -z "$XLSTM_SUCCESSOR" ] || scancel "$XLSTM_SUCCESSOR"
  exit "$XLSTM_EXIT"
}
