#!/usr/bin/env bash
# Two-way FEVER, with evidence that is found and without any: fever.sh FEVER WORK, where FEVER holds passages.jsonl (id, title,
# text), questions.train.jsonl and questions.dev.jsonl (the claim as question, SUPPORTS or REFUTES as its answer). The claims
# of the dev set are half and half, so that always saying the same is right in 50 %.
set -euo pipefail
fever=$1 work=$2
mkdir -p "$work"
echo '{"id": "nothing", "title": "", "text": "There is no evidence."}' > "$work/nothing.jsonl"
ragstone index "$fever/passages.jsonl" --whole --kb "$work/fever"
ragstone index "$work/nothing.jsonl" --whole --kb "$work/nothing"
learn() { ragstone train "$1" "$fever/questions.train.jsonl" --model local-untrained --out "$2" --lora-rank 8 --bf16 \
    --batch-size 16 --learning-rate 5e-4 --warmup-steps 10 --steps "$STEPS" --save-every 50 --seed 0 "${@:3}"; }
judge() { ragstone evaluate "$1" "$fever/questions.dev.jsonl" --model "$2" --labels SUPPORTS,REFUTES -k "$3"; }
STEPS=${STEPS:-350}
learn "$work/nothing" "$work/claim-only" -k 1 --freeze-question-encoder
learn "$work/fever" "$work/with-evidence" -k 3 --question-encoder-lora-rank 8
judge "$work/nothing" "$work/claim-only" 1
judge "$work/fever" "$work/with-evidence" 3
judge "$work/fever" local-untrained 3
