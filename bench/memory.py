"""Does the memory estimator agree with what training takes? `python bench/memory.py [--device cuda] [--only PART]`.

On a CPU three measurements: the allocator's record of one training step for a grid of shapes and
switches; the resident memory of fresh processes of about half a gigabyte; and, without an estimate of
its own, what torch.compile saves.  On a GPU the grid only, with the caching allocator's maximum.
"""
import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.memory import peak_bytes, training_memory
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import train_step
from nanochat_nb.scaling import config_for_depth

ADDITIONS = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "qk_scale": 1.2}
SWITCHES = [{"chunk_tokens": chunk, "recompute": again} for again in (False, True) for chunk in (0, 64)]


def trainer(config: GPTConfig, batch_size: int, dtype: torch.dtype, device: str = "cpu", grad_accum: bool = True,
            chunk_tokens: int = 0, recompute: bool = False, compile: bool = False):
    "One training step as a function, and the bytes of weights, tables and optimizer state."
    model = GPT(config).init_weights(0).to(device)
    model.compute_dtype, model.chunk_tokens, model.recompute = dtype, chunk_tokens, recompute
    optimizer = setup_optimizer(model)
    state = [t for bundle in optimizer.bundles for t in bundle.state.values()]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *state])
    step_model = torch.compile(model) if compile else model

    def step():
        idx = torch.randint(config.vocab_size, (1 + grad_accum, batch_size, config.sequence_len), device=device)
        train_step(step_model, optimizer, [(row, row) for row in idx])

    return step, held


def shapes(device: str) -> dict[str, tuple[GPTConfig, int]]:
    "Name → shape and batch size; larger ones on a GPU, whose allocator rounds up."
    if device == "cuda":
        return {f"d{depth}": (config_for_depth(depth, vocab, 1024), batch)
                for depth, vocab, batch in ((6, 65536, 8), (8, 32768, 16), (12, 32768, 8), (12, 65536, 2))}
    def config(depth, **changes):
        return config_for_depth(depth, **{"vocab_size": 4096, "sequence_len": 128, **changes})
    return {"d2": (config(2), 4), "d4": (config(4), 3), "d6": (config(6), 1), "d4, V 512": (config(4, vocab_size=512), 3),
            "d4, V 16,384": (config(4, vocab_size=16384), 1), "d4, one key head": (config(4, n_kv_head=1), 2),
            "d2, T 1,024": (config(2, sequence_len=1024), 1), "d4, all additions": (config(4, **ADDITIONS), 3),
            "d3, windows": (config(3, sequence_len=512, window_pattern="SSL"), 1)}


def grid(device: str) -> list[dict]:
    "Estimate and measurement of every shape × dtype × switch."
    rows = []
    dtypes = (torch.float32, torch.bfloat16)
    for (name, (config, batch)), dtype, switches in itertools.product(shapes(device).items(), dtypes, SWITCHES):
        step, held = trainer(config, batch, dtype, device, **switches)
        measured = held + peak_bytes(step, device)
        estimate = training_memory(config, batch, dtype=dtype, device_type=device, **switches)["total"]
        rows.append({"shape": name, "batch_size": batch, "dtype": str(dtype)[6:], **switches, "predicted": estimate,
                     "measured": measured, "ratio": round(estimate / measured, 4)})
        print(rows[-1], flush=True)
        del step
    return rows


def resident(key: str) -> int:
    "Bytes of this process by the kernel's books: VmRSS now, VmHWM at most."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def process(setting: dict) -> dict:
    "In a fresh process: how much its resident memory grows at most, from before the model to after two steps."
    setting = dict(setting)
    dtype = getattr(torch, setting.pop("dtype", "float32"))
    depth, batch = setting.pop("depth"), setting.pop("batch_size")
    config = config_for_depth(depth, setting.pop("vocab_size"), setting.pop("sequence_len"))
    tiny = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    trainer(tiny, 1, dtype, **setting)[0]()             # loads the kernels
    Path("/proc/self/clear_refs").write_text("5")       # the peak starts anew
    before = resident("VmRSS")
    step, _ = trainer(config, batch, dtype, **setting)
    step(), step()
    measured = resident("VmHWM") - before
    estimate = training_memory(config, batch, dtype=dtype, device_type="cpu", **setting)["total"]
    return {"predicted": estimate, "measured": measured, "ratio": round(estimate / measured, 4)}


def processes(device: str) -> list[dict]:
    rows = []
    for switches in SWITCHES:
        setting = {"depth": 4, "vocab_size": 32768, "sequence_len": 256, "batch_size": 2, **switches}
        # every tensor its own mapping, given back at once: the C library would keep freed memory
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run([sys.executable, __file__, "--process", json.dumps(setting)], check=True, text=True,
                                capture_output=True, env=environment).stdout
        rows.append(setting | json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def compiled(device: str) -> list[dict]:
    "Peak of a step of the eager and of the compiled model, and the estimate, which is for the eager one."
    config, batch, rows = config_for_depth(2, 4096, 128), 8, []
    for switches in SWITCHES[:2]:
        row = {"shape": "d2", "batch_size": batch, "dtype": "float32", **switches,
               "predicted": training_memory(config, batch, dtype=torch.float32, device_type="cpu", **switches)["total"]}
        for name in ("eager", "compiled"):
            step, held = trainer(config, batch, torch.float32, compile=name == "compiled", **switches)
            step()                                      # compiles
            row[name] = held + peak_bytes(step)
        rows.append(row | {"compiled_over_eager": round(row["compiled"] / row["eager"], 3)})
        print(rows[-1], flush=True)
    return rows


PARTS = {"grid": grid, "processes": processes, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=list(PARTS), help="measure this part anew, keep the others' stored rows")
    parser.add_argument("--process", type=json.loads, help="internal: one setting, in this process")
    args = parser.parse_args()
    if args.process:
        print(json.dumps(process(args.process)))
        return
    suffix = "" if args.device == "cpu" else "_cuda"
    path = Path(__file__).parent / "results" / f"memory{suffix}.json"
    result = json.loads(path.read_text()) if args.only and path.exists() else {}
    result |= {"what": "peak bytes of one training step (two micro-batches), estimated and measured",
               "hardware": platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(),
               "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d")}
    for name, part in PARTS.items():
        if args.only in (None, name) and (args.device == "cpu" or name == "grid"):
            result[name] = part(args.device)
    ratios = [row["ratio"] for name in ("grid", "processes") for row in result.get(name, [])]
    if ratios:
        result["ratios"] = {"cases": len(ratios), "lowest": min(ratios), "highest": max(ratios)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(result.get("ratios"))


if __name__ == "__main__":
    main()
