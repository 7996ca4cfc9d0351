#!/usr/bin/env bash
# How the adapter of "local" was made, and how training goes on from it: local.sh SQUAD WORK, where SQUAD holds
# train.passages.jsonl, questions.train.jsonl, passages.jsonl and questions.dev.jsonl (paragraphs of SQuAD v1.1 with id, title,
# text; questions with answers and positive_ids). About five hours on two cores, and minutes of a GPU for the last stage.
set -euo pipefail
squad=$1 work=$2 here=$(dirname "$0")
export OMP_WAIT_POLICY=active GOMP_SPINCOUNT=1000000 # threads wait awake; nothing else may run
ragstone index "$squad/train.passages.jsonl" --whole --kb "$work/train"
ragstone index "$squad/passages.jsonl" --whole --kb "$work/dev"
learn() { ragstone train "$work/train" "$squad/questions.train.jsonl" --model local-untrained --test-k 5 --lora-rank 16 --bf16 "$@"; }
# The generator reads gold passages.
learn --out "$work/read" -k 1 --with-positives --freeze-question-encoder --batch-size 8 --learning-rate 5e-4 \
    --warmup-steps 20 --steps 400 --save-every 50 --seed 0
# What joint training is measured against: as many questions as all stages have, gold passages alone.
learn --adapters "$work/read" --out "$work/gold" -k 1 --with-positives --freeze-question-encoder --batch-size 32 --learning-rate 5e-4 \
    --lora-dropout 0.1 --warmup-steps 20 --steps 512 --save-every 100 --seed 4
python "$here/ship.py" "$work/gold" "$work/generator-only" --parts generator --score-scale 8 --keyword-scale 0.2 --extractive
# Both parts and τ, from the gold passage and the nearest other one; the generator writes nothing where the answer does not stand.
joint() { learn -k 2 --decline-weight 1 --score-scale 40 --question-encoder-lora-rank 4 --learn-score-scale --learning-rate 4e-4 --warmup-steps 15 "$@"; }
joint --adapters "$work/read" --out "$work/joint" --with-positives --batch-size 8 --question-encoder-learning-rate 2e-4 \
    --steps 220 --save-every 40 --seed 1
# The same with the passages of the batch, each read once (shared_passages.py measures that).
batch() { joint --method sequence --in-batch --batch-size 16 --question-encoder-learning-rate 1e-4 "$@"; }
batch --adapters "$work/joint" --out "$work/batch" --steps 250 --save-every 20 --seed 2
batch --adapters "$work/batch" --out "$work/long" --steps 450 --save-every 50 --seed 3
# K = 5 as at test time, passages found by vectors and words. This stage was trained on a GPU; there it takes minutes.
joint --adapters "$work/long" --out "$work/found" -k 5 --search hybrid --with-positives --method sequence --batch-size 12 \
    --learning-rate 3e-4 --question-encoder-learning-rate 1e-4 --lora-dropout 0.1 --warmup-steps 20 --steps 341 --save-every 50 --seed 4
# This is what "local" ships: the question encoder's adapter gains nothing measurable, τ and β are scale.py's choice.
python "$here/ship.py" "$work/found" "$work/local" --parts generator --score-scale 8 --keyword-scale 0.2 --extractive
dev=(--kb "$work/dev" --questions "$squad/questions.dev.jsonl")
python "$here/prior.py" --kb "$work/train" --questions "$squad/questions.train.jsonl" --dev-kb "$work/dev" --dev "$squad/questions.dev.jsonl"
python "$here/scale.py" --model "$work/local" "${dev[@]}" --search hybrid --methods token --answers extractive --limit 300 --not-among 600 \
    --scales 8 14 --keyword-scales 0 0.2 0.42
python "$here/matrix.py" --models local-untrained "$work/generator-only" "$work/local" "${dev[@]}" --limit 500 --out "$work/matrix" \
    --searches hybrid dense keyword
