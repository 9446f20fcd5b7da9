#!/usr/bin/env bash
# Text of your own -> tokenizer -> packed shards, checked.
#
#   examples/own_corpus.sh my/texts 'more/*.jsonl.gz'
#   OUT=data/own VOCAB_SIZE=32000 SEQ_LEN=2048 examples/own_corpus.sh corpus/
#
# Writes OUT/tokenizer and OUT/shards. The same command continues after a stop.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: examples/own_corpus.sh FILE_OR_FOLDER_OR_GLOB ..." >&2; exit 2; }

python=${PYTHON:-.venv/bin/python}
out=${OUT:-data/own}

"$python" -m data_prep tokenizer --input "$@" --vocab-size "${VOCAB_SIZE:-8192}" --out "$out/tokenizer"
"$python" -m data_prep build --input "$@" --tokenizer "$out/tokenizer" --out "$out/shards" \
  --seq-len "${SEQ_LEN:-512}" --valid-fraction 0.05
"$python" -m data_prep verify "$out/shards" --full
"$python" -m data_prep inspect "$out/shards"
