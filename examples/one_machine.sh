#!/usr/bin/env bash
# Checks a run file and trains it with several processes on this machine.
#
#   examples/one_machine.sh                              examples/run.yaml, two processes
#   NPROC=8 examples/one_machine.sh my.yaml --layout.tensor 2 --layout.sequence true
#
# Further words are keys of the run file. Ctrl-C saves; the same command continues. On GPUs give
# NPROC the number of GPUs.
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
run=${1:-examples/run.yaml}
[ $# -eq 0 ] || shift

"$python" -m pretrain check "$run" --nproc "${NPROC:-2}" "$@"
"$python" -m pretrain launch "$run" --nproc "${NPROC:-2}" "$@"
