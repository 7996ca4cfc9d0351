#!/usr/bin/env bash
# A seq2seq generator through the same commands: seq2seq.sh SQUAD WORK (files as for local.sh, whose two knowledge bases are used).
# The generator is an encoder-decoder of MiniLM twice, whose cross-attention is new; it is trained for minutes, which
# shows that everything works and not more: its answers are not right yet.
set -euo pipefail
squad=$1 work=$2
python - "$work/minilm-twice" <<'PYTHON'
import sys

from transformers import AutoTokenizer, EncoderDecoderModel

from ragstone import RagTokenForGeneration, RagTokenizer
from ragstone.local import encoder_folder

folder, minilm = sys.argv[1], str(encoder_folder())
generator = EncoderDecoderModel.from_encoder_decoder_pretrained(minilm, minilm)
tokenizer = AutoTokenizer.from_pretrained(minilm)
generator.config.decoder_start_token_id = tokenizer.cls_token_id
generator.config.eos_token_id, generator.config.pad_token_id = tokenizer.sep_token_id, tokenizer.pad_token_id
generator.config.vocab_size = generator.config.decoder.vocab_size
generator.generation_config.decoder_start_token_id = tokenizer.cls_token_id
generator.generation_config.eos_token_id = tokenizer.sep_token_id
generator.generation_config.pad_token_id = tokenizer.pad_token_id
generator.save_pretrained(folder + "/generator")
tokenizer.save_pretrained(folder + "/generator")
model = RagTokenForGeneration.from_pretrained_question_encoder_generator(minilm, folder + "/generator")
model.config.max_combined_length, model.config.n_docs, model.config.score_scale = 256, 5, 20.0
model.save_pretrained(folder)
RagTokenizer(AutoTokenizer.from_pretrained(minilm), tokenizer).save_pretrained(folder)
PYTHON
ragstone train "$work/train" "$squad/questions.train.jsonl" --model "$work/minilm-twice" --out "$work/read-seq2seq" \
    --with-positives -k 1 --freeze-question-encoder --batch-size 16 --learning-rate 1e-4 --warmup-steps 20 --bf16 \
    --steps 200 --save-every 100 --seed 0
ragstone train "$work/train" "$squad/questions.train.jsonl" --model "$work/read-seq2seq" --out "$work/joint-seq2seq" \
    -k 3 --test-k 5 --batch-size 8 --learning-rate 5e-5 --question-encoder-learning-rate 2e-5 --warmup-steps 10 --bf16 \
    --steps 40 --save-every 40 --seed 0
for model in read-seq2seq joint-seq2seq; do
    ragstone evaluate "$work/dev" "$squad/questions.dev.jsonl" --limit 200 --seed 0 -k 5 --max-new-tokens 24 --model "$work/$model"
done
