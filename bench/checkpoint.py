"""How long training stands still for a checkpoint: `OMP_NUM_THREADS=1 python bench/checkpoint.py [--dir FOLDER]`.

Three ways, in turns within each round, after one round to warm up; the time is that of the call:

    naive       torch.save of weights and optimizer over the files of the last time: no fsync, no
                hashes, and half a file if killed; for comparison only
    waiting     save_checkpoint's work: copy, write, hash, fsync, rename
    background  Saver.save: the copy; a thread does the rest, here before the next call begins

What the thread takes away from a training that needs all processors is not in these numbers.
"""
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nanochat_nb.checkpoint import Saver
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer

WIDTHS = (16, 48, 128, 384, 1024)   # with a vocabulary of 8,192: 3 to 300 MB
ROUNDS = 9
RESULTS = Path(__file__).parent / "results" / "checkpoint.json"


def model_of(width):
    config = GPTConfig(sequence_len=16, vocab_size=8192, n_layer=1, n_head=2, n_kv_head=2, n_embd=width)
    model = GPT(config).init_weights(seed=0)
    return model, setup_optimizer(model)


def measure(width, folder):
    "The three ways at one size, best and median."
    model, optimizer = model_of(width)
    saver = Saver("base", f"w{width}", keep=1)

    def naive():
        torch.save(model.state_dict(), folder / "model.pt")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    def background():
        saver.save(turn, model, optimizer)

    def waiting():
        background()
        saver.wait()

    ways = {"naive": naive, "waiting": waiting, "background": background}
    still, on_disk = {way: [] for way in ways}, []
    for turn in range(ROUNDS + 1):
        for way, save in ways.items():
            started = time.perf_counter()
            save()
            still[way].append(1000 * (time.perf_counter() - started))
            saver.wait()
        on_disk.append(1000 * (time.perf_counter() - started))
    still = {way: times[1:] for way, times in still.items()}
    size = sum(t.nbytes for tensors in saver.copies.values() for t in tensors.values())
    row = {"megabytes": round(size / 1e6, 1),
           "standstill_ms": {way: {"best": round(min(times), 2), "median": round(statistics.median(times), 2)}
                             for way, times in still.items()},
           "background_until_on_disk_ms": {"best": round(min(on_disk), 1),
                                           "median": round(statistics.median(on_disk), 1)},
           "waiting_to_background": {
               "of_bests": round(min(still["waiting"]) / min(still["background"]), 1),
               "median_of_rounds": round(statistics.median(
                   a / b for a, b in zip(still["waiting"], still["background"])), 1)}}
    print(f"{row['megabytes']:6.1f} MB | best (median) of {ROUNDS}: "
          + " | ".join(f"{way} {values['best']:7.1f} ({values['median']:7.1f}) ms"
                       for way, values in row["standstill_ms"].items())
          + f" | ratio {row['waiting_to_background']['of_bests']:5.1f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", default=None, help="a folder on the disk to be measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        rows = [measure(width, Path(folder)) for width in WIDTHS]
    result = {"what": "ms for which one checkpoint stops the training, by its size: see the script's first lines",
              "hardware": f"{os.cpu_count()} × {cpu}, shared with other work: quote ratios", "rounds": ROUNDS,
              "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"), "sizes": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
