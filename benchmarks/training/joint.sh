#!/usr/bin/env bash
# Both parts learn on, from the adapters of "local", with the gold passage and the nearest other one; from passages without the
# answer the generator learns to write nothing: joint.sh SQUAD WORK, after local.sh. Some 75 minutes on two cores.
set -euo pipefail
squad=$1 work=$2 here=$(dirname "$0")
ragstone train "$work/train" "$squad/questions.train.jsonl" --model local-untrained --out "$work/joint" \
    --adapters "$here/../../src/ragstone/local_checkpoint" -k 2 --test-k 5 --with-positives --decline-weight 1 --lora-rank 16 \
    --question-encoder-lora-rank 4 --learn-score-scale --batch-size 8 --learning-rate 4e-4 \
    --question-encoder-learning-rate 2e-4 --warmup-steps 15 --bf16 --steps 220 --save-every 40 --seed 1
python "$here/ship.py" "$work/joint" "$work/joint-bf16"
python "$here/matrix.py" --kb "$work/dev" --questions "$squad/questions.dev.jsonl" --limit 200 --out "$work/matrix" \
    --models local "$work/joint-bf16" --methods token --searches dense hybrid -k 5
