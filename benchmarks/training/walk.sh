#!/usr/bin/env bash
# Every command of docs/training.md, in its order, on files of your own: walk.sh DOCUMENTS TRAIN DEV WORK, where DOCUMENTS is a
# folder and TRAIN and DEV are question files. The work folder gets them under the names that the page gives them.
set -euo pipefail
page=$(realpath "$(dirname "$0")/../../docs/training.md")
mkdir -p "$4"
cp -r "$1" "$4/my-documents"
cp "$2" "$4/train.jsonl"
cp "$3" "$4/dev.jsonl"
cd "$4"
sed -n '/^    ragstone .*\\$/,/[^\\]$/p; /^    ragstone .*[^\\]$/p' "$page" > commands.sh
set -x
. ./commands.sh
