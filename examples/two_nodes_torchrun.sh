#!/usr/bin/env bash
# One run over two machines, with torchrun. Start it on both, with the same run file and a run.dir
# that both of them see:
#
#   MASTER_ADDR=node0 NODE_RANK=0 NPROC=8 examples/two_nodes_torchrun.sh my.yaml      # on node0
#   MASTER_ADDR=node0 NODE_RANK=1 NPROC=8 examples/two_nodes_torchrun.sh my.yaml      # on node1
#
# Without NODE_RANK it starts both "nodes" on this machine, to try it out. Further words are keys of
# the run file. torchrun turns every exit code of a run into 1, a stop that can be continued
# included; the last lines of the output say which it was. The same commands continue.
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
run=${1:-examples/run.yaml}
[ $# -eq 0 ] || shift

export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29400}
node() {
  "$python" -m torch.distributed.run --nnodes 2 --node-rank "$1" --nproc-per-node "${NPROC:-1}" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m pretrain train "$run" "${@:2}"
}

if [ -n "${NODE_RANK:-}" ]; then
  node "$NODE_RANK" "$@"
else
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  node 1 "$@" &
  other=$!
  trap 'kill "$other" 2>/dev/null || true' EXIT  # if node 0 fails, node 1 would wait for it
  node 0 "$@"
  wait "$other"
fi
