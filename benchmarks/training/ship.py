"""Make the adapters of ``"local"`` out of a trained checkpoint: bfloat16, and at most 12 MB.

    python benchmarks/training/ship.py TRAINED src/ragstone/local_checkpoint [--parts generator] [--score-scale 10] \\
        [--keyword-scale 0.2] [--extractive]

``--parts`` leaves out the adapter of a part that it does not pay to ship. Figures are to be measured with the files this
writes. The model card (README.md) in the target folder is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ragstone.models.adapters import ADAPTER_WEIGHTS, ADAPTERS, PARTS

LARGEST = 12 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("-k", type=int, default=5, help="passages a question, unless told otherwise")
    parser.add_argument("--method", choices=["token", "sequence"], default="token", help="unless told otherwise")
    parser.add_argument("--score-scale", type=float, help="τ [the learnt one]; scale.py compares some")
    parser.add_argument("--keyword-scale", type=float, default=0.0, help="β, likewise")
    parser.add_argument(
        "--extractive", action="store_true", help="answers are spans of passages, unless told otherwise"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    config = json.loads((options.trained / "config.json").read_text(encoding="utf-8"))
    config |= {"n_docs": options.k, "architectures": [f"Rag{options.method.title()}ForGeneration"]}
    config |= {"score_scale": options.score_scale or config["score_scale"], "extractive": options.extractive}
    config |= {"keyword_scale": options.keyword_scale}
    if "question_encoder" not in options.parts:  # it stays what encoded the passages
        config |= {"passage_encoder": None, "passage_fingerprint": None}
    (options.target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(options.target / ADAPTERS, ignore_errors=True)
    for part in options.parts:
        if (options.trained / ADAPTERS / part).exists():
            shutil.copytree(options.trained / ADAPTERS / part, options.target / ADAPTERS / part)
    for file in (options.target / ADAPTERS).glob("*/adapter_config.json"):  # the place of the base is this machine's
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings |= {"base_model_name_or_path": None, "target_modules": sorted(settings["target_modules"])}
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    files = list((options.target / ADAPTERS).glob(f"*/{ADAPTER_WEIGHTS}"))
    for file in files:
        save_file({name: weight.to(torch.bfloat16) for name, weight in load_file(file).items()}, file)
    size = sum(file.stat().st_size for file in files)
    print(f"{options.target}: {size / 1e6:.1f} MB in {len(files)} adapters")
    if size > LARGEST:
        raise SystemExit(f"These are more than {LARGEST / 1e6:.0f} MB; train adapters of a lower rank.")


if __name__ == "__main__":
    main()
