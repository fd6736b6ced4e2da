"""What each addition to the plain model is worth at a small depth, in bits per byte of real text.

`python bench/architecture.py --data_dir FOLDER` (text shards, as `nanochat_nb.dataset` reads them).
Every variant of a seed sees the same batches (and starts from the same weights, but for value_embeds and
smear, whose gates draw first), so that differences can be taken pair by pair. One thread per run; the
results do not depend on the machine's speed. Runs with the same settings that the JSON file already holds
are not repeated.
"""
import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from nanochat_nb.dataloader import PackedLoader, validation_batches
from nanochat_nb.dataset import Documents, resolve_data_dir
from nanochat_nb.gpt import GPT
from nanochat_nb.optimizer import (NEWTON_SCHULZ, lr_schedule, momentum_schedule,
                                   setup_optimizer)
from nanochat_nb.pretraining import evaluate_bpb, train_step
from nanochat_nb.scaling import config_for_depth
from nanochat_nb.tokenizer import Tokenizer

VARIANTS = {
    "plain": {},
    "value_embeds": {"value_embeds": True},
    "residual_scalars": {"residual_scalars": True},
    "smear": {"smear": True},
    "backout": {"backout": True},
    "all four": {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True},
    "qk_scale 1.2": {"qk_scale": 1.2},
    "no softcap": {"logit_softcap": 0.0},
    "one key/value head": {"n_kv_head": 1},
    "windows SSL": {"window_pattern": "SSL"},
}
DEPTH, VOCAB, T, B, STEPS, SEEDS = 3, 2048, 256, 8, 300, 3
RATES = {"matrix_lr": 0.04, "embedding_lr": 0.2, "unembedding_lr": 0.008}    # for small batches
EVAL_TOKENS = 100 * B * T


def train(changes: dict, seed: int, data: Path, tokenizer: Tokenizer) -> dict:
    "One run: final validation bits per byte, parameters and FLOPs per token."
    model = GPT(config_for_depth(DEPTH, VOCAB, T, **changes)).init_weights(seed)
    model.compute_dtype = torch.bfloat16
    optimizer = setup_optimizer(model, **RATES, polynomials=NEWTON_SCHULZ, beta2=0)     # plain Muon
    batches = PackedLoader(Documents(data, "train"), tokenizer, B, T, seed=seed)
    for step in range(STEPS):
        train_step(model, optimizer, [next(batches)], lr_schedule(step, STEPS),
                   momentum_schedule(step, STEPS // 4))
    val = validation_batches(Documents(data, "val"), tokenizer, B, T, EVAL_TOKENS)
    return {"bpb": evaluate_bpb(model, val, tokenizer.token_bytes()),
            "parameters": model.num_parameters()["total"], "flops_per_token": model.flops_per_token()}


def table(runs: dict) -> list[dict]:
    "Per variant: mean, and the mean difference to plain with its standard error over seeds."
    rows = []
    for name in VARIANTS:
        found = {seed: runs[f"{name}, seed {seed}"] for seed in range(SEEDS)
                 if f"{name}, seed {seed}" in runs and f"plain, seed {seed}" in runs}
        if not found:
            continue
        gain = [runs[f"plain, seed {seed}"]["bpb"] - run["bpb"] for seed, run in found.items()]
        first = next(iter(found.values()))
        rows.append({"variant": name, "seeds": len(found), "parameters": first["parameters"],
                     "flops_per_token": first["flops_per_token"],
                     "bpb": round(mean(run["bpb"] for run in found.values()), 4),
                     "gain": round(mean(gain), 4),
                     "stderr": round(stdev(gain) / len(gain) ** 0.5, 4) if len(gain) > 1 else None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder with text shards")
    data = resolve_data_dir(parser.parse_args().data_dir)
    torch.set_num_threads(1)
    texts = itertools.islice(Documents(data, "train"), 20_000)
    tokenizer = Tokenizer.train(texts, VOCAB)
    path = Path(__file__).parent / "results" / "architecture.json"
    settings = {"depth": DEPTH, "vocab_size": VOCAB, "sequence_len": T, "batch": B, "steps": STEPS, "rates": RATES,
                "variants": VARIANTS}
    old = json.loads(path.read_text()) if path.exists() else {}
    runs = old["runs"] if old.get("settings") == settings else {}
    for seed, (name, changes) in itertools.product(range(SEEDS), VARIANTS.items()):
        key = f"{name}, seed {seed}"
        if key not in runs:
            runs[key] = train(changes, seed, data, tokenizer)
            print(key, runs[key], flush=True)
            result = {"what": f"depth {DEPTH}, width {64 * DEPTH}, vocabulary {VOCAB}, sequence {T}, "
                              f"{STEPS} steps of {B * T} tokens of real text, bf16, plain Muon and AdamW; "
                              "gain in bits per byte over plain (positive is better), paired by seed",
                      "settings": settings, "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"),
                      "rows": table(runs), "runs": runs}
            path.write_text(json.dumps(result, indent=1) + "\n")
    for row in table(runs):
        print(row)


if __name__ == "__main__":
    main()
