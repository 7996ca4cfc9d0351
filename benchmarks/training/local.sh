#!/usr/bin/env bash
# How the adapter of "local" was made and measured: local.sh SQUAD WORK, where SQUAD holds train.passages.jsonl,
# questions.train.jsonl, passages.jsonl and questions.dev.jsonl (paragraphs of SQuAD v1.1 with id, title, text; questions with
# answers and positive_ids). About an hour and a half on two cores.
set -euo pipefail
squad=$1 work=$2
ragstone index "$squad/train.passages.jsonl" --whole --kb "$work/train"
ragstone index "$squad/passages.jsonl" --whole --kb "$work/dev"
ragstone train "$work/train" "$squad/questions.train.jsonl" --model local-untrained --out "$work/read" \
    --with-positives -k 1 --freeze-question-encoder --lora-rank 16 --batch-size 8 --learning-rate 5e-4 --warmup-steps 20 \
    --bf16 --steps 400 --save-every 50 --seed 0
python "$(dirname "$0")/ship.py" "$work/read" "$(dirname "$0")/../../src/ragstone/local_checkpoint"
measure() { ragstone evaluate "$work/dev" "$squad/questions.dev.jsonl" --limit 200 --seed 0 -k 5 --max-new-tokens 24 "$@"; }
measure
measure --model "$work/read"
measure --model "$work/read" --search hybrid
