"""What a loss in chunks costs or saves on a CPU, forward and backward: `python bench/loss.py`.

One thread; the variants take turns, each figure is the least CPU time of its rounds; ratios are to the
eager textbook form (all logits at once) of the same dtype and vocabulary.
"""
import json
import os
import platform
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from nanochat_nb.loss import head_loss

N, C, SOFTCAP, ROUNDS = 4096, 256, 15.0, 4
CHUNKS = (128, 512, 2048)


def in_checkpoints(x, weight, targets, chunk_tokens):
    "The generic way to hold less: textbook chunks under torch.utils.checkpoint."
    parts = zip(x.split(chunk_tokens), targets.split(chunk_tokens))
    return torch.cat([checkpoint(head_loss, x_c, weight, targets_c, SOFTCAP, use_reentrant=False)
                      for x_c, targets_c in parts])


def variants() -> dict:
    "Name → function of (x, weight, targets)."
    made = {"textbook": (0, "sum")} | {f"sum, chunks of {n}": (n, "sum") for n in CHUNKS}
    made["none, chunks of 512"] = (512, "none")
    functions = {name: partial(head_loss, softcap=SOFTCAP, chunk_tokens=n, reduction=reduction)
                 for name, (n, reduction) in made.items()}
    compiled = {f"{name}, compiled": torch.compile(function) for name, function in functions.items()
                if name in ("textbook", "sum, chunks of 512", "none, chunks of 512")}
    return functions | {"checkpoint, chunks of 256": partial(in_checkpoints, chunk_tokens=256)} | compiled


def measure(vocab_size: int, dtype: torch.dtype) -> dict[str, float]:
    "Least CPU seconds of a forward and backward pass, by variant."
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab_size, C, generator=generator)).requires_grad_()
    targets = torch.randint(vocab_size, (N,), generator=generator)
    functions = variants()
    best = dict.fromkeys(functions, float("inf"))
    for round_ in range(ROUNDS + 1):                      # the first one compiles
        for name, function in functions.items():
            x.grad = weight.grad = None
            start = time.process_time()
            (function(x, weight, targets).sum() / N).backward()
            if round_:
                best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for vocab_size in (4096, 16384):
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()
            best = measure(vocab_size, dtype)
            for name, seconds in best.items():
                rows.append({"vocab_size": vocab_size, "dtype": str(dtype)[6:], "variant": name,
                             "seconds": round(seconds, 3),
                             "ratio_to_textbook": round(seconds / best["textbook"], 2)})
                print(rows[-1], flush=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    result = {"what": f"loss of {N:,} tokens of width {C}, softcap {SOFTCAP:g}, forward and backward; CPU time, one "
                      f"thread, least of {ROUNDS} rounds in which all variants took turns",
              "hardware": f"{os.cpu_count()} × {cpu}", "torch": torch.__version__.split("+")[0],
              "date": time.strftime("%Y-%m-%d"), "rows": rows}
    path = Path(__file__).parent / "results" / "loss.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
