"""Every fault of lesson 5c, done to a real run of the tiny model: found how, lost what, how long.

    python bench/faults.py

Runs are forked from a server that has imported torch (tests/forked.py), on one rank or on two that
talk by gloo. Writes bench/results/faults.json: the table, and the loss curves of an undisturbed run
and of one killed four times, which must be equal.
"""
import datetime
import json
import platform
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402
from forked import HANG, NAN, POISON, TINY, Forker, make_base  # noqa: E402
from nb import hardware  # noqa: E402

DISK_FULL = """
from nanochat_nb import checkpoint
original, saves = checkpoint.Saver._write, []
def write(*args):
    saves.append(1)
    if 3 <= len(saves) < 7:
        raise OSError(28, "No space left on device")
    return original(*args)
checkpoint.Saver._write = write
"""
MEMORY = """
import resource
original = pretraining.fit
def fit(*args, **kwargs):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 120_000_000,) * 2)
    return original(*args, **kwargs)
pretraining.fit = fit
"""
SPIKE = """
import torch
original = pretraining.train_step
def train_step(model, optimizer, batches, *args, guard=None, **kwargs):
    train_step.calls = getattr(train_step, "calls", 0) + 1
    guard.recent = {kind: type(v)(v, maxlen=8) for kind, v in guard.recent.items()}
    if train_step.calls == 11:
        batches = [(i, t, torch.full(t.shape, 50.0)) for i, t in batches]
    return original(model, optimizer, batches, *args, guard=guard, **kwargs)
pretraining.train_step = train_step
"""
LONG = {"num_iterations": 100_000, "eval_every": -1}


class Lab:
    "Runs faults and keeps what came of them."

    def __init__(self, forker: Forker):
        self.forker, self.base, self.table = forker, forker.base, []

    def losses(self, name: str) -> list[tuple[int, float]]:
        path = self.base / "logs" / f"{name}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]

    def until(self, condition) -> float:
        deadline = time.monotonic() + 120
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the run did not come as far as its fault")
            time.sleep(0.002)
        return time.monotonic()

    def saved(self, name: str) -> int:
        "The newest step of which there is a checkpoint."
        steps = [int(p.name[5:]) for p in (self.base / "checkpoints/base" / name).glob("step_*")]
        return max(steps, default=0)

    def note(self, fault, injected, found, seconds, lost, codes):
        row = {"fault": fault, "injected": injected, "found": found, "seconds": round(seconds, 1),
               "steps_lost": lost, "exit_codes": codes}
        self.table.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)

    def run(self, fault, injected, flags=None, ranks=1, prelude="", act=None, found=None):
        "One fault: start, let it happen, wait for the end, keep what the run said."
        name = re.sub(r"\W+", "-", fault)
        children = self.forker.train(TINY | (flags or {}), ranks, prelude, name)
        began = self.until(lambda: len(self.losses(name)) >= 4 or children[0].poll() is not None)
        if act:
            act(children)
        live = [child for child in children if child.code != -9]
        for child in live:
            if not self.stopped(child):
                child.wait(120)
        seconds = time.monotonic() - began
        for child in children:
            child.send(signal.SIGKILL)
        text = children[0].text().strip().splitlines()[-1]
        if found and any(child.wait() for child in children):
            raise RuntimeError(f"{fault}: the run should have gone on, but: {text}")
        done = len(self.losses(name))
        self.note(fault, injected, found or self.brief(text), seconds,
                  max(done - self.saved(name), 0), [child.wait() for child in children])

    @staticmethod
    def stopped(child) -> bool:
        "Whether a child was frozen with SIGSTOP."
        state = Path(f"/proc/{child.pid}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "T"

    def brief(self, text: str) -> str:
        "A message without the folders and process numbers of this machine."
        text = text.replace(f"{self.base}/", "")
        text = re.sub(r"\(process \d+ on [^)]*\)", "(process …)", text)
        return re.sub(r"process \d+", "process …", text)

    def kill_and_restart(self, fault, ranks, flags=None):
        "SIGKILL after a few steps; the same command again, to its end."
        name = re.sub(r"\W+", "-", fault)
        children = self.forker.train(TINY | (flags or {}), ranks, name=name)
        self.until(lambda: len(self.losses(name)) >= 8)
        began = time.monotonic()
        children[-1].send(signal.SIGKILL)
        codes = [child.wait() for child in children]
        lost = len(self.losses(name)) - self.saved(name)
        again = self.forker.train(TINY | (flags or {}), ranks, name=name)
        text = self.brief(children[0].text().strip().splitlines()[-1]) if ranks > 1 else \
            "at the next start: the newest whole checkpoint"
        codes += [child.wait() for child in again]
        self.note(fault, "SIGKILL, then the same command", text, time.monotonic() - began, lost,
                  codes)


def overlay(lab: Lab) -> dict:
    "Losses of an undisturbed run and of one killed four times at random moments."
    flags, draw = TINY | {"num_iterations": 60, "save_every": 5}, random.Random(5)
    lab.forker.train(flags, name="undisturbed")[0].wait(120)
    attempts = []
    for goal in (8, 21, 33, 47):
        child, = lab.forker.train(flags, name="killed")
        lab.until(lambda: len(lab.losses("killed")) >= goal)
        time.sleep(draw.uniform(0, 0.05))
        child.send(signal.SIGKILL)
        child.wait()
        attempts.append(lab.losses("killed"))
    lab.forker.train(flags, name="killed")[0].wait(120)
    weights = [(lab.base / "checkpoints/base" / name / "step_000060/model.safetensors").read_bytes()
               for name in ("undisturbed", "killed")]
    return {"undisturbed": lab.losses("undisturbed"), "attempts": [*attempts, lab.losses("killed")],
            "equal_losses": lab.losses("undisturbed") == lab.losses("killed"),
            "equal_weights": weights[0] == weights[1]}


def freeze(children) -> None:
    children[1].send(signal.SIGSTOP)


def main() -> None:
    base = Path(tempfile.mkdtemp())
    make_base(base)
    with Forker(base) as forker:
        lab = Lab(forker)
        lab.forker.train(TINY, name="warm")[0].wait(120)          # files in the cache
        lab.kill_and_restart("killed, one rank", 1, {"save_every": 3})
        lab.kill_and_restart("killed, one of two ranks", 2, {"save_every": 3})
        for number in (signal.SIGTERM, signal.SIGINT):
            lab.run(f"{number.name}, one of two ranks", f"{number.name} to rank 1", LONG |
                    {"save_every": -1}, 2, act=lambda c, n=number: c[1].send(n))
        for kind, what in (("loss", "a weight of NaN on one micro-batch"),
                           ("gradient", "an infinite gradient"), ("weight", "a NaN in a weight")):
            lab.run(f"not finite, {kind}", f"{what}, rank 1 of 2", {}, 2,
                    NAN[kind] + POISON.replace('"POISONED", "0"', '"POISONED", "1"'))
        lab.run("a spike of the loss", "a batch with 50 times the loss", {"spike_guard": True},
                prelude=SPIKE, found="skipped and counted, the run goes on")
        lab.run("a rank sleeps", "time.sleep on rank 1; --rank_timeout 4", {"rank_timeout": 4}, 2,
                HANG.format(how="time.sleep(600)"))
        lab.run("a rank is frozen", "SIGSTOP to rank 1; --rank_timeout 4",
                LONG | {"rank_timeout": 4, "save_every": 3}, 2, act=freeze)
        lab.run("a bug on one rank", "an exception on rank 1", {}, 2,
                HANG.format(how='raise ZeroDivisionError("a bug")'))
        lab.run("disk full", "ENOSPC in four saves", {"save_every": 2}, prelude=DISK_FULL,
                found="a warning, older checkpoints stay, the run goes on")
        lab.run("out of memory", "RLIMIT_AS 120 MB above what is used",
                {"device_batch_size": 96, "total_batch_size": 96 * 512, "max_seq_len": 512,
                 "chunk_tokens": 0, "num_iterations": 2}, prelude=MEMORY)
        curves = overlay(lab)
    result = {"date": datetime.date.today().isoformat(), "hardware": hardware(),
              "python": platform.python_version(), "torch": torch.__version__.split("+")[0],
              "note": "seconds from the fault to the end of the last rank (after a kill: of the "
                      "run that went on); on a machine that did other work too",
              "table": lab.table, "overlay": curves}
    path = ROOT / "bench/results/faults.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"losses equal: {curves['equal_losses']}, weights equal: {curves['equal_weights']}")


if __name__ == "__main__":
    main()
