"""Iso-FLOP curves of tiny models: how size and data should share a budget of arithmetic.

`python bench/scaling_laws.py` (the built-in world) or `--data_dir FOLDER` (text shards, as
`nanochat_nb.dataset` reads them). For each budget several models are trained, the small ones for longer,
each with two seeds and its own schedule; no token is seen twice. One thread; the results do not depend
on the machine's speed. Runs that the JSON file holds already are not repeated.
"""
import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch

from nanochat_nb.dataloader import PackedLoader, validation_batches
from nanochat_nb.dataset import Documents
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import lr_schedule, momentum_schedule, setup_optimizer
from nanochat_nb.pocket import write_pocket
from nanochat_nb.pretraining import evaluate_bpb, train_step
from nanochat_nb.scaling import flops_per_token
from nanochat_nb.tokenizer import Tokenizer

GRID = {3e10: (16, 24, 32, 48, 64), 1e11: (16, 24, 32, 48, 64),        # budget → widths
        3e11: (24, 32, 48, 64, 96), 1e12: (32, 48, 64, 96, 128)}
DEPTH, VOCAB, T, B, SEEDS = 2, 512, 64, 8, 2
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.008}
EVAL_TOKENS = 32_768


def config_of(width: int) -> GPTConfig:
    "Two blocks, two heads; only the width changes."
    return GPTConfig(sequence_len=T, vocab_size=VOCAB, n_layer=DEPTH, n_head=2, n_kv_head=2, n_embd=width)


def num_steps(flops: float, width: int) -> int:
    return round(flops / (flops_per_token(config_of(width)) * B * T))


def train(width: int, steps: int, rows: list, seed: int, val: list, token_bytes, rates=RATES) -> dict:
    "One run on the first `steps` batches."
    started = time.perf_counter()
    model = GPT(config_of(width)).init_weights(seed)
    optimizer = setup_optimizer(model, **rates)
    for step in range(steps):
        train_step(model, optimizer, [rows[step]], lr_schedule(step, steps),
                   momentum_schedule(step, min(300, steps // 4)))
    count = model.num_parameters()
    return {"width": width, "seed": seed, "steps": steps, "tokens": steps * B * T,
            "flops": steps * B * T * model.flops_per_token(), "parameters": count["total"],
            "matrices": count["blocks"] + count["lm_head"], "blocks": count["blocks"],
            "bpb": evaluate_bpb(model, val, token_bytes),
            "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="folder with text shards; default: the built-in world")
    parser.add_argument("--output", default="scaling_laws.json", help="name in bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data_dir or folder + "/pocket"
        if not args.data_dir:
            write_pocket(data, num_chars=20_000_000)
        measure(data, "text shards" if args.data_dir else "the built-in world",
                Path(__file__).parent / "results" / args.output)


def measure(data: str, text: str, path: Path) -> None:
    documents, held_out = Documents(data, "train"), Documents(data, "val")
    tokenizer = Tokenizer.train(itertools.islice(documents, 2000), VOCAB)
    val = list(validation_batches(held_out, tokenizer, 16, T, EVAL_TOKENS))
    settings = {"text": text, "vocab_size": VOCAB, "sequence_len": T, "batch_tokens": B * T, "rates": RATES,
                "depth": DEPTH, "eval_tokens": EVAL_TOKENS}
    old = json.loads(path.read_text()) if path.exists() else {}
    runs = old["runs"] if old.get("settings") == settings else []
    done = {(run["budget"], run["width"], run["seed"]) for run in runs}
    for seed in range(SEEDS):
        batches, rows = PackedLoader(documents, tokenizer, B, T, seed=seed), []
        for flops, widths in GRID.items():
            for width in widths:
                if (flops, width, seed) in done:
                    continue
                steps = num_steps(flops, width)
                rows += [next(batches) for _ in range(steps - len(rows))]
                if batches.state_dict()["epoch"]:
                    raise SystemExit("the text is too short: some would be seen twice")
                runs.append({"budget": flops, **train(width, steps, rows, seed, val,
                                                      tokenizer.token_bytes())})
                print(runs[-1], flush=True)
                result = {"what": "tiny models trained on a fixed budget of arithmetic, bits per byte of "
                                  "held-out text; each run has its own schedule, no token is seen twice",
                          "settings": settings, "torch": torch.__version__.split("+")[0],
                          "hardware": "one core, AMD EPYC, fp32", "date": time.strftime("%Y-%m-%d"), "runs": runs}
                path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
