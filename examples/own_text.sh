#!/usr/bin/env bash
# From your own text to a model that transformers opens:
#
#     bash examples/own_text.sh my_text.txt runs/mine [trainer flags]
#
# The text has blank lines between documents; .jsonl and .parquet files and folders work as well. Its vocabulary is
# trained on it, unless --tokenizer names one. The same command goes on where it was stopped. Without further flags
# peer-tiny is trained, which takes minutes on a laptop and learns little: peer-small is the smallest that is worth its
# time, on a GPU.
set -euo pipefail

text=$1 folder=$2
shift 2

peer-scale train --data-path "$text" \
    --save "$folder/checkpoints" --log-dir "$folder/logs" "$@"

if [[ ! -e $folder/hf ]]; then
    peer-scale convert to-hf --load "$folder/checkpoints" --output "$folder/hf"
fi
