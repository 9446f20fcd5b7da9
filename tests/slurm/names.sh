#!/bin/bash
# Runs a command that finds the names of the nodes in a file: names.sh ROOT COMMAND [WORD ...]
# It has a mount namespace of its own. Where no name server can be reached, asking one takes 10 s for
# each peer, and the controller of a newer Slurm answers nobody meanwhile.
set -e
root=$1
shift
mount --make-rprivate /
for file in hosts nsswitch.conf resolv.conf; do
  [ ! -e "/etc/$file" ] || mount --bind "$root/etc/$file" "$(realpath "/etc/$file")"
done
exec "$@"
