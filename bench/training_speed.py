"""What bf16 and torch.compile buy when the pocket model (depth 4) trains here: `python bench/training_speed.py`.

The four variants take turns, so that a machine whose speed drifts treats them alike.
"""
import json
import os
import platform
import time
from pathlib import Path

import torch

from nanochat_nb.common import Compute
from nanochat_nb.gpt import GPT
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import peak_flops, train_step
from nanochat_nb.scaling import config_for_depth

B, T, STEPS, ROUNDS = 16, 256, 4, 4      # one micro-batch of 4,096 tokens a step


def variant(dtype: torch.dtype, compiled: bool):
    "A model, its training callable and optimizer; returns them with the seconds of the first step."
    model = GPT(config_for_depth(4, 4096, T)).init_weights(0)
    model.compute_dtype = dtype
    optimizer = setup_optimizer(model)
    step_model = torch.compile(model) if compiled else model
    start = time.perf_counter()
    train_step(step_model, optimizer, [batch()])
    return model, step_model, optimizer, time.perf_counter() - start


def batch():
    idx = torch.randint(4096, (B, T + 1))
    return idx[:, :-1], idx[:, 1:]


def main() -> None:
    torch.manual_seed(0)
    peaks = {str(d)[6:]: peak_flops(Compute(torch.device("cpu"), d)) for d in (torch.float32, torch.bfloat16)}
    variants = {(str(d)[6:], c): variant(d, c) for d in (torch.float32, torch.bfloat16) for c in (False, True)}
    best = {key: float("inf") for key in variants}
    for _ in range(ROUNDS):
        for key, (_, step_model, optimizer, _) in variants.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                train_step(step_model, optimizer, [batch()])
            best[key] = min(best[key], (time.perf_counter() - start) / STEPS)
    flops = variants["float32", False][0].flops_per_token()
    base = best["float32", False]
    rows = [{"dtype": dtype, "compiled": compiled, "tokens_per_second": round(B * T / seconds),
             "ratio_to_fp32_eager": round(base / seconds, 2), "share_of_matmul_peak": round(flops * B * T / seconds / peaks[dtype], 2),
             "first_step_seconds": round(variants[dtype, compiled][3], 1)}
            for (dtype, compiled), seconds in best.items()]
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    result = {"what": "training step of depth 4, 4,096 tokens, sequence 256, vocabulary 4,096, optimizer included",
              "hardware": f"{os.cpu_count()} × {cpu}", "torch": torch.__version__.split("+")[0],
              "date": time.strftime("%Y-%m-%d"), "matmul_peak_gflops": {k: round(v / 1e9) for k, v in peaks.items()},
              "variants": rows}
    path = Path(__file__).parent / "results" / "training_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
