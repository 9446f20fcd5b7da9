#!/bin/bash
# Process 1 of a virtual node, in namespaces of its own: node.sh ROOT NAME ADDRESS
# Its death is the crash of the node: the kernel then ends everything on it at once.
set -e
root=$1 name=$2 address=$3
hostname "$name"
ip link set lo up
for _ in $(seq 200); do
  ip link show eth0 >/dev/null 2>&1 && break
  sleep 0.02
done
ip addr add "$address" dev eth0
ip link set eth0 up
mount -t tmpfs -o size=2g shm /dev/shm
mkdir -p "$root/local/$name" "$root/scratch"
mount --bind "$root/local/$name" "$root/scratch"
export SLURM_CONF=$root/etc/slurm.conf

# The node outlives its slurmd: the death of slurmd alone is another fault than a crash. The file
# NAME.restart asks for a new one.
start() { "$SLURMD" -D -N "$name" & echo $! >"$root/pids/$name.slurmd"; }
start
while :; do
  if [ -e "$root/pids/$name.restart" ]; then
    rm -f "$root/pids/$name.restart"
    start
  fi
  wait -n 2>/dev/null || true  # collects orphans
  sleep 0.2
done
