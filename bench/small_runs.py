"""Which rates, batch, schedule and decay do small runs like? `python bench/small_runs.py --data_dir FOLDER`

Depths 2 and 4 with the default additions on real text, sequence 256, vocabulary 4,096: a baseline, and
runs that differ from it in one or two settings. `decay` is the sum of rate × weight decay over the run;
`momentum` a constant one, or the plain schedule (0.85 to 0.95 over a quarter of the run) if it is None.
Rows that the JSON has are not run again. One thread; 15 minutes for depth 2 and half an hour for depth 4.
"""
import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from nanochat_nb.common import keep_freed_memory
from nanochat_nb.dataloader import PackedLoader, validation_batches
from nanochat_nb.dataset import Documents
from nanochat_nb.gpt import GPT
from nanochat_nb.optimizer import lr_schedule, momentum_schedule, setup_optimizer
from nanochat_nb.pretraining import evaluate_bpb, train_step
from nanochat_nb.scaling import additions, config_for_depth
from nanochat_nb.tokenizer import train_tokenizer

T, VOCAB, VAL_TOKENS, MICRO = 256, 4096, 60_000, 4096
PATH = Path(__file__).parent / "results" / "small_runs.json"
BASE = {"depth": 2, "tokens": 400_000, "batch": 2048, "matrix_lr": 0.04, "embedding_lr": 0.2, "unembedding_lr": 0.008,
        "decay": 0.0, "cautious": False, "warmdown": 0.4, "final": 0.0, "momentum": None, "seed": 0,
        "extras": "value_embeds,residual_scalars,smear"}
GRID = [
    {"seed": [0, 1, 2]},
    {"matrix_lr": [0.02, 0.08]},
    {"tokens": [100_000], "matrix_lr": [0.02, 0.04, 0.08, 0.16]},
    {"batch": [512, 1024]},
    {"decay": [1, 2, 4, 8]},
    {"decay": [2, 4], "cautious": [True]},
    {"warmdown": [0.2, 0.7, 1.0]},
    {"final": [0.05]},
    {"embedding_lr": [0.1, 0.4]},
    {"unembedding_lr": [0.004, 0.016]},
    {"momentum": [0.8, 0.9]},
    {"extras": ["none", "value_embeds", "value_embeds,residual_scalars", "all"]},
    {"tokens": [800_000], "batch": [1024, 2048, 4096, 8192]},
    {"tokens": [1_600_000], "momentum": [None, 0.8, 0.9]},
    *({"depth": [4], "tokens": [600_000], **changes} for changes in (
        {"matrix_lr": [0.02, 0.04, 0.08]}, {"batch": [4096]}, {"momentum": [0.8, 0.9]}, {"decay": [2]},
        {"momentum": [0.9], "decay": [2], "warmdown": [0.65]})),
]
models = {}


def run(tokenizer, train, batches, s: dict) -> float:
    "Bits per byte after one run with these settings."
    if (s["depth"], s["extras"]) not in models:
        model = GPT(config_for_depth(s["depth"], VOCAB, T, **additions(s["extras"])))
        model.compute_dtype, model.chunk_tokens = torch.bfloat16, 512
        models[s["depth"], s["extras"]] = model, torch.compile(model)
    model, step_model = models[s["depth"], s["extras"]]
    model.init_weights(s["seed"])
    steps = s["tokens"] // s["batch"]
    schedule = [lr_schedule(step, steps, 0.0, s["warmdown"], s["final"]) for step in range(steps)]
    optimizer = setup_optimizer(model, s["matrix_lr"], s["embedding_lr"], s["unembedding_lr"],
                                weight_decay=s["decay"] / (s["matrix_lr"] * sum(schedule)), cautious=s["cautious"])
    rows = iter(PackedLoader(train, tokenizer, min(s["batch"], MICRO) // T, T, seed=s["seed"]))
    for step in range(steps):
        momentum = s["momentum"] or momentum_schedule(step, min(300, max(steps // 4, 1)))
        train_step(step_model, optimizer, [next(rows) for _ in range(max(s["batch"] // MICRO, 1))], schedule[step],
                   momentum)
    return evaluate_bpb(model, batches, tokenizer.token_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a folder with text shards")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    data_dir = Path(args.data_dir)
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        tokenizer = train_tokenizer(str(data_dir), vocab_size=VOCAB)
        train, val = Documents(data_dir, "train"), Documents(data_dir, "val")
        batches = list(validation_batches(val, tokenizer, 16, T, max_tokens=VAL_TOKENS))
        for changes in GRID:
            for values in itertools.product(*changes.values()):
                settings = BASE | dict(zip(changes, values))
                known = any({key: row[key] for key in settings} == settings for row in rows)
                if known or settings["depth"] not in args.depths:
                    continue
                rows.append(settings | {"bpb": round(run(tokenizer, train, batches, settings), 4)})
                print({key: rows[-1][key] for key in (*changes, "bpb")}, flush=True)
                result = {"what": f"validation bits per byte of small runs, sequence {T}, vocabulary {VOCAB:,}, "
                                  f"{VAL_TOKENS:,} tokens of {data_dir.resolve().parent.name}/{data_dir.resolve().name}",
                          "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"), "rows": rows}
                PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
