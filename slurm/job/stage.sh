# Copies folders to this node's own disk: stage.sh TARGET SOURCE NAME [SOURCE NAME ...]
# One task per node. A copy that is there already is left as it is; one that was cut short is not
# taken for a whole one.
# shellcheck shell=bash
set -uo pipefail
trap '' USR1 USR2 # the batch script looks for a request to stop
target=$1
shift
mkdir -p "$target" || exit 1
while [ $# -ge 2 ]; do
  source=$1 copy=$target/$2
  shift 2
  [ ! -d "$copy" ] || continue
  rm -rf "$copy.part"
  # The build state is of no use to a reader.
  if ! { mkdir "$copy.part" && tar -C "$source" --exclude=./_work -cf - . | tar -C "$copy.part" -xf - &&
    mv "$copy.part" "$copy"; }; then
    echo "$(uname -n): $source was not copied to $copy" >&2
    rm -rf "$copy.part"
    exit 1
  fi
done
