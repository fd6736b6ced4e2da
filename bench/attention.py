"""What an attention layer costs on this CPU, forward and backward: `python bench/attention.py`.

For several lengths T, with windows of T / 4: the formula, PyTorch's fused call, a window as a dense
mask, a window in pieces.  The variants take turns, so that a machine whose speed drifts treats them
alike; of each the best counts.  One thread and its own CPU time: others may use the machine too.
"""
import argparse
import functools
import json
import os
import platform
import time
from pathlib import Path

import torch

from nanochat_nb.attention import attention, attention_pieces, piece_length

LENGTHS, TOKENS = (256, 512, 1024, 2048, 4096), 4096     # each batch has as many tokens
H, D = 4, 64
VARIANTS = {                                             # name → (backend, with a window?)
    "naive, full": ("naive", False), "fused, full": ("sdpa", False),
    "naive, window": ("naive", True), "dense mask, window": ("sdpa", True),
    "pieces, window": ("pieces", True)}


def inputs(T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(TOKENS // T, H, T, D, dtype=dtype, requires_grad=True) for _ in range(3)]


def seconds(function, q, k, v) -> float:
    "CPU time of one forward and backward pass."
    start = time.process_time()
    y = function(q, k, v)
    y.backward(torch.ones_like(y))
    return time.process_time() - start


def best_of_turns(functions: dict, tensors: list, rounds: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function, *tensors))
    return best


def measure_backends(T: int, dtype: torch.dtype, rounds: int) -> dict:
    "Milliseconds per variant, and how often the rule's choices go into the others."
    functions = {name: functools.partial(attention, window=T // 4 if windowed else -1, backend=backend)
                 for name, (backend, windowed) in VARIANTS.items()}
    best = best_of_turns(functions, inputs(T, dtype), rounds)
    full, window = best["fused, full"], best["pieces, window"]
    return {"T": T, "window": T // 4, "dtype": str(dtype)[6:], "piece": piece_length(T // 4),
            "ms": {name: round(1000 * s, 1) for name, s in best.items()},
            "naive / fused": round(best["naive, full"] / full, 2),
            "dense mask / pieces": round(best["dense mask, window"] / window, 2),
            "fused full / pieces": round(full / window, 2)}


def measure_pieces(T: int, window: int, dtype: torch.dtype, rounds: int) -> dict:
    "How much slower each length of a piece is than the best of them; and which one we take."
    lengths = [p for p in (32, 64, 128, 256, 512) if p <= T]
    functions = {p: functools.partial(attention_pieces, window=window, piece=p) for p in lengths}
    best = best_of_turns(functions, inputs(T, dtype), rounds)
    return {"T": T, "window": window, "dtype": str(dtype)[6:], "ours": piece_length(window),
            "slower_than_best": {p: round(s / min(best.values()), 2) for p, s in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    rows = [measure_backends(T, dtype, rounds) for dtype in dtypes for T in LENGTHS]
    for row in rows:
        print({key: value for key, value in row.items() if key != "ms"}, flush=True)
    pieces = [measure_pieces(T, window, dtype, rounds) for dtype in dtypes
              for T, window in ((512, 64), (1024, 128), (1024, 256), (2048, 512), (4096, 1024))]
    for row in pieces:
        print(row, flush=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor())
    result = {"what": f"one attention layer forward and backward, {TOKENS:,} tokens, {H} heads of "
                      f"{D}, window T / 4; CPU time, interleaved, best of {rounds}",
              "hardware": f"{os.cpu_count()} × {cpu}", "threads": torch.get_num_threads(),
              "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
              "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"),
              "backends": rows, "piece_lengths": pieces}
    path = Path(__file__).parent / "results" / "attention.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
