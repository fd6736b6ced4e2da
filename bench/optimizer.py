"""Which parts of the optimizer help a tiny GPT: `OMP_NUM_THREADS=1 python bench/optimizer.py [--only small|large]`.

Text: a data folder (default: the one that NANOCHAT_TEST_DATA names, else the built-in world's text).
Each variant gets the best matrix rate of a grid of factors of 2, chosen on seed 0 and extended until
the best is not at its edge; then it is trained with seeds 1, 2, 3. A seed fixes weights and batches,
so that variants can be compared seed by seed. The rates of tables and head are the same for all.
All variants see a small batch, two of them a batch four times as large.
"""
import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from nanochat_nb.dataset import Documents
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import NEWTON_SCHULZ, MuonAdamW, lr_schedule, momentum_schedule, setup_optimizer
from nanochat_nb.pocket import documents as pocket_documents
from nanochat_nb.pretraining import evaluate_bpb, train_step
from nanochat_nb.tokenizer import Tokenizer

VOCAB_SIZE, T = 512, 128
CONFIG = dict(sequence_len=T, vocab_size=VOCAB_SIZE, n_layer=2, n_head=4, n_kv_head=4, n_embd=128)
TRAIN_TOKENS, VAL_ROWS = 1_000_000, 64
SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results"

PLAIN = dict(polynomials=NEWTON_SCHULZ, beta2=0.0)
DECAY = dict(weight_decay=0.1)
VARIANTS = {  # name: (settings of setup_optimizer, or None for AdamW, first matrix rates)
    "AdamW for all": (None, (0.002, 0.004, 0.008)),
    "Muon, Newton–Schulz": (PLAIN, (0.02, 0.04, 0.08)),
    "Muon, Polar Express": (dict(beta2=0.0), (0.02, 0.04, 0.08)),
    "Polar Express + NorMuon": ({}, (0.02, 0.04, 0.08)),
    "… + cautious decay 0.1": (DECAY | dict(cautious=True), (0.02, 0.04, 0.08)),
    "… + plain decay 0.1": (DECAY, (0.02, 0.04, 0.08)),
}
EXPERIMENTS = {  # name: (rows of T tokens in a batch, steps, variants)
    "small": (8, 150, list(VARIANTS)),
    "large": (32, 75, ["AdamW for all", "Polar Express + NorMuon"]),
    "long": (8, 300, ["AdamW for all", "Polar Express + NorMuon"]),   # as many tokens as "large"
}


def read_text(data_dir):
    "A tokenizer and token ids of training and validation text."
    if data_dir:
        train, val = Documents(data_dir, "train").sample(1000), Documents(data_dir, "val").sample(100)
    else:
        train = [text for _, text in zip(range(8000), pocket_documents(random.Random(0)))]
        val = [text for _, text in zip(range(400), pocket_documents(random.Random(1)))]
    tokenizer = Tokenizer.train(train, VOCAB_SIZE)
    ids = [torch.tensor([i for text in texts for i in [tokenizer.bos, *tokenizer.encode(text)]])
           for texts in (train, val)]
    return tokenizer, ids[0][:TRAIN_TOKENS], ids[1]


def windows(ids, starts):
    rows = torch.stack([ids[i:i + T + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


def make_optimizer(model, settings, lr):
    if settings is not None:
        return setup_optimizer(model, matrix_lr=lr, **settings)
    groups = setup_optimizer(model).param_groups
    return MuonAdamW([group if group["kind"] == "adamw" else {"kind": "adamw", "params": group["params"], "lr": lr}
                      for group in groups])


def train(settings, lr, seed, data, B, steps):
    "Final validation loss in bits per byte of one run."
    tokenizer, train_ids, val_ids = data
    model = GPT(GPTConfig(**CONFIG)).init_weights(seed)
    optimizer = make_optimizer(model, settings, lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(train_ids) - T - 1, (B,), generator=generator).tolist()
        train_step(model, optimizer, [windows(train_ids, starts)], lr_schedule(step, steps),
                   momentum_schedule(step))
    starts = torch.linspace(0, len(val_ids) - T - 2, VAL_ROWS).long().tolist()
    batches = [windows(val_ids, starts[i:i + 8]) for i in range(0, VAL_ROWS, 8)]
    return evaluate_bpb(model, batches, tokenizer.token_bytes())


def best_rate(settings, rates, *rest):
    "The best rate on seed 0 and what each gave."
    losses = {lr: train(settings, lr, 0, *rest) for lr in rates}
    while (best := min(losses, key=losses.get)) in (edge := (min(losses), max(losses))):
        lr = best / 2 if best == edge[0] else best * 2
        losses[lr] = train(settings, lr, 0, *rest)
    return best, losses


def experiment(data, B, steps, variants):
    "Rows of results, one for each variant, with the difference to the first one seed by seed."
    rows = []
    for name in variants:
        started, (settings, rates) = time.time(), VARIANTS[name]
        best, tried = best_rate(settings, rates, data, B, steps)
        losses = [train(settings, best, seed, data, B, steps) for seed in SEEDS]
        rows.append({"variant": name, "matrix_lr": best, "bpb": [round(x, 5) for x in losses],
                     "mean": round(statistics.mean(losses), 4), "std": round(statistics.stdev(losses), 4),
                     "less_adamw": [round(a - b, 4) for a, b in zip(losses, rows[0]["bpb"] if rows else losses)],
                     "tuning": {lr: round(loss, 4) for lr, loss in sorted(tried.items())}})
        print(rows[-1], f"{time.time() - started:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--only", choices=list(EXPERIMENTS), default=None)
    arguments = parser.parse_args()
    root = os.environ.get("NANOCHAT_TEST_DATA")
    data_dir = arguments.data_dir or (str(Path(root) / "text") if root else None)
    torch.set_num_threads(1)
    data, path = read_text(data_dir), RESULTS / "optimizer.json"
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    result = {"what": f"validation loss in bits per byte; depth 2, width 128, vocabulary {VOCAB_SIZE}, sequence {T}; "
                      "matrix rates chosen on seed 0, losses of seeds 1, 2, 3",
              "text": "a folder of real text" if data_dir else "the built-in world",
              "parameters": GPT(GPTConfig(**CONFIG)).num_parameters(), "hardware": f"one core of {cpu}",
              "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"), "experiments": {}}
    if arguments.only and path.exists():
        result["experiments"] = json.loads(path.read_text(encoding="utf-8"))["experiments"]
    for name in [arguments.only] if arguments.only else EXPERIMENTS:
        B, steps, variants = EXPERIMENTS[name]
        rows = experiment(data, B, steps, variants)
        result["experiments"][name] = {"tokens_per_step": B * T, "steps": steps, "variants": rows}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
