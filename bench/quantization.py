"""What rounding its weights costs a trained model: `python bench/quantization.py --data_dir FOLDER`.

Takes the newest base model under NANOCHAT_BASE_DIR (or `--model_tag`), rounds its matrices to 8 … 3 bits
with one scale a row or one for every 32 weights, and measures bits per byte on the validation text.
"""
import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch

from nanochat_nb.checkpoint import load_model
from nanochat_nb.common import Compute
from nanochat_nb.dataloader import validation_batches
from nanochat_nb.dataset import Documents
from nanochat_nb.pretraining import evaluate_bpb
from nanochat_nb.quantization import dequantize, matrix_bytes, pack, quantize


@torch.no_grad()
def rounded(model, bits: int, group: int):
    "A copy with rounded matrices; tables that are looked up stay as they are."
    copied = copy.deepcopy(model)
    for name, p in copied.named_parameters():
        if p.ndim == 2 and min(p.shape) >= 32 and "wte" not in name and "value_embed" not in name:
            p.copy_(dequantize(*quantize(p, bits, group)))
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a folder with text shards")
    parser.add_argument("--model_tag", default="")
    parser.add_argument("--eval_tokens", type=int, default=100_000)
    args = parser.parse_args()
    model, tokenizer, meta = load_model("base", Compute(torch.device("cpu"), torch.float32), args.model_tag)
    T, rows, token_bytes = model.config.sequence_len, [], tokenizer.token_bytes()
    batches = list(validation_batches(Documents(Path(args.data_dir), "val"), tokenizer, 8, T, args.eval_tokens))
    exact = evaluate_bpb(model, batches, token_bytes)

    def add(name: str, bits: float, other) -> None:
        bpb = evaluate_bpb(other, batches, token_bytes)
        rows.append({"weights": name, "bits": bits, "bpb": round(bpb, 5), "lost": round(bpb - exact, 5)})
        print(rows[-1], flush=True)

    for bits in (8, 6, 5, 4, 3):
        for group in (0, 32):
            add(f"{bits} bits, {'groups of 32' if group else 'one scale a row'}", bits + (16 / 32 if group else 0),
                rounded(model, bits, group))
    for weights in ("int8", "int4"):
        packed = pack(model, weights)
        add(f"packed, {weights}", 32 * matrix_bytes(packed) / matrix_bytes(model), packed)
    result = {"what": f"bits per byte on {args.eval_tokens:,} tokens of validation text after rounding the matrices; bits: of "
                      "a weight, with its share of the scales",
              "model": {"parameters": model.num_parameters()["total"], "steps": meta["step"], **model.config.to_dict()},
              "hardware": f"{os.cpu_count()} cores", "torch": torch.__version__.split("+")[0],
              "date": time.strftime("%Y-%m-%d"), "exact_bpb": round(exact, 5), "rows": rows}
    (Path(__file__).parent / "results" / "quantization.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
