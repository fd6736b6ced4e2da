"""What the default rules get out of the same text: `python bench/sample_efficiency.py --data_dir FOLDER`.

Depth 4 on real text, bits per byte of its validation part, three seeds each: the defaults of
`pretraining` beside the plain 2025-11 recipe (no additions; Muon with plain Newton–Schulz and without
NorMuon, its momentum from 0.85 to 0.95 in 300 steps; rates 0.02, 0.2, 0.004; no weight decay; warm-down
over the last fifth). The plain recipe's batch of 524,288 tokens would leave it a handful of steps, so it gets ours, to its advantage.

`--tokens N` gives both the same number of tokens; `--minutes M` the same time on this machine instead,
compiling included and the last evaluation not: then the plain recipe also computes as it did on a CPU, in fp32. Each run is a
process of its own; seed by seed the two recipes run side by side, a thread each, so that they share the
good and the bad moments of the machine. Results go to bench/results/.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEPTH, T, VOCAB, EVAL_TOKENS = 4, 512, 4096, 500_000
PLAIN = {"extras": "none", "matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "weight_decay": 0.0,
         "warmdown_ratio": 0.2}
RECIPES = {"default": {}, "plain 2025-11": PLAIN}


def one_run(name: str, seed: int, flags: dict) -> dict:
    "Train and evaluate; how pretraining was called, what it reached and how long it took."
    from nanochat_nb import pretraining
    from nanochat_nb.common import RunLog
    from nanochat_nb.optimizer import NEWTON_SCHULZ, momentum_schedule
    if name != "default":
        pretraining.muon_momentum = lambda step, num_iterations: momentum_schedule(step, 300, 0.85, 0.95)
        pretraining.setup_optimizer = functools.partial(pretraining.setup_optimizer, polynomials=NEWTON_SCHULZ,
                                                        beta2=0.0)
    flags = {"depth": DEPTH, "max_seq_len": T, "eval_every": -1, "eval_tokens": EVAL_TOKENS, "device_type": "cpu",
             "model_tag": f"{name.split()[0]}-{seed}", "run": f"{name.split()[0]}-{seed}", "seed": seed,
             **RECIPES[name], **flags}
    start, output = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(output):
        bpb = pretraining.pretrain(**flags)
    losses = [row["loss"] for row in RunLog(flags["run"]).read() if "loss" in row]
    return {"recipe": name, "seed": seed, "bpb": round(bpb, 4), "steps": len(losses),
            "seconds": round(time.perf_counter() - start), "last_losses": round(statistics.mean(losses[-20:]), 4),
            "said": output.getvalue().split("\nstep ")[0]}                   # the rules, not the steps


def in_a_process(base: str, name: str, seed: int, flags: dict, fp32: bool) -> dict:
    "`one_run` in a fresh process with one thread."
    environment = {**os.environ, "NANOCHAT_BASE_DIR": base, "OMP_NUM_THREADS": "1",
                   **({"NANOCHAT_DTYPE": "float32"} if fp32 else {})}
    call = [sys.executable, __file__, "--one", name, "--seeds", str(seed), "--flags", json.dumps(flags)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def tokens_per_second(base: str, name: str, batch: int, fp32: bool, data_dir: str) -> tuple[float, float]:
    "Speed when warm, and the seconds that a run spends on its start and on compiling, from one short run."
    from nanochat_nb.common import RunLog
    steps = 24
    flags = {"data_dir": data_dir, "num_iterations": steps, "total_batch_size": batch, "compile": 1, "eval_tokens": T,
             "device_batch_size": min(batch // T, 16)}
    made = in_a_process(base, name, 99, flags, fp32)
    os.environ["NANOCHAT_BASE_DIR"] = base
    speeds = [row["tokens_per_second"] for row in RunLog(f"{name.split()[0]}-99").read() if "loss" in row]
    speed = statistics.median(speeds[4:])
    return speed, made["seconds"] - steps * batch / speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="a folder with text shards")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--flags", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one_run(args.one, args.seeds[0], json.loads(args.flags))))
    from nanochat_nb.common import compute_dtype
    from nanochat_nb.scaling import batch_tokens
    from nanochat_nb.tokenizer import train_tokenizer
    data_dir, rows = str(Path(args.data_dir).resolve()), []
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        train_tokenizer(data_dir, vocab_size=VOCAB)
        tokens, budgets = {name: args.tokens for name in RECIPES}, {}
        with ThreadPoolExecutor(len(RECIPES)) as pool:
            if args.minutes:
                measured = pool.map(lambda name: tokens_per_second(base, name, 4096, name != "default", data_dir), RECIPES)
                for name, (speed, other) in zip(RECIPES, measured):
                    tokens[name] = int(speed * (60 * args.minutes - other))
                    budgets[name] = {"tokens_per_second": round(speed), "other_seconds": round(other)}
                    print(name, budgets[name], f"{tokens[name]:,} tokens", flush=True)
            for seed in args.seeds:
                jobs = []
                for name in RECIPES:
                    batch = batch_tokens(tokens[name])
                    flags = {"data_dir": data_dir, "total_batch_size": batch, "num_iterations": tokens[name] // batch,
                             "device_batch_size": min(batch // T, 16), "compile": 1}
                    jobs.append(functools.partial(in_a_process, base, name, seed, flags,
                                                  bool(args.minutes) and name != "default"))
                for row in pool.map(lambda job: job(), jobs):
                    rows.append(row)
                    print({key: value for key, value in row.items() if key != "said"}, flush=True)
    summary = {}
    for name in RECIPES:
        scores = [row["bpb"] for row in rows if row["recipe"] == name]
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
        summary[name] = {"bpb": round(statistics.mean(scores), 4), "std": round(spread, 4), "n": len(scores),
                         "tokens": tokens[name], **budgets.get(name, {})}
    gain = 1 - summary["default"]["bpb"] / summary["plain 2025-11"]["bpb"]
    print(summary, f"default is {gain:.1%} lower")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    import torch
    result = {"what": f"validation bits per byte at depth {DEPTH}, sequence {T}, vocabulary {VOCAB:,}, on "
                      f"{EVAL_TOKENS:,} tokens of the folder's validation text",
              "budget": f"{args.minutes:g} minutes on one core, compiling included, the last evaluation not" if args.minutes else f"{args.tokens:,} tokens",
              "hardware": f"{os.cpu_count()} × {cpu}, {str(compute_dtype('cpu'))[6:]}",
              "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"), "summary": summary,
              "default_is_lower_by": round(gain, 4), "runs": rows}
    kind = "equal_time" if args.minutes else "sample_efficiency"
    (Path(__file__).parent / "results" / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
