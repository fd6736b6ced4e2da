"""Real processes that start at once: a server imports the package, then forks a child per run.

Importing torch takes seconds, a fork milliseconds; a test that kills twenty runs needs the second.
The children are processes like any other: SIGKILL kills them, their exit codes are real.
"""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_nb.tokenizer import Tokenizer

SERVER = """
import json, os, sys
import nanochat_nb.pretraining
import torch._dynamo   # seconds, for who makes a model on the meta device
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if "code" in job:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(job["env"])
            exec(job["code"], {"__name__": "child"})
            break
        print(json.dumps(pid), flush=True)
    else:
        pid, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
"""
TRAIN = """
import sys
from nanochat_nb import common, faults, pretraining
{prelude}
common.run_cli(pretraining.pretrain, {flags})
"""


class Child:
    "One process; a rank of a run, if it has one."

    def __init__(self, forker, pid: int, output: Path):
        self.forker, self.pid, self.output, self.code = forker, pid, output, None

    def poll(self) -> int | None:
        "The exit code, minus the signal's number after a kill; None while it runs."
        if self.code is None:
            self.code = self.forker.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 180) -> int:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still runs after {seconds} s:\n{self.text()}"
            time.sleep(0.005)
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def text(self) -> str:
        "What it printed, on both streams."
        return self.output.read_text() if self.output.exists() else ""


class Forker:
    "Starts children; those still there at its end are killed."

    def __init__(self, base: Path, **env):
        self.base, self.children = base, []
        self.env = {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"} | env

    def __enter__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **self.env})
        return self

    def __exit__(self, *error):
        for child in self.children:
            child.send(signal.SIGKILL)
            child.wait()
        self.server.stdin.close()
        self.server.wait()

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, code: str, **env) -> Child:
        "A child that executes `code`."
        output = self.base / f"output-{len(self.children)}.txt"
        child = Child(self, self.ask(code=code, output=str(output), env=env), output)
        self.children.append(child)
        return child

    def train(self, flags: dict, ranks: int = 1, prelude: str = "",
              name: str = "run") -> list[Child]:
        "`python -m nanochat_nb.pretraining` after a prelude, on each rank; flags by name."
        argv = [part for key, value in flags.items()
                for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
        argv += ["--model_tag", name, "--run", name]
        code = TRAIN.format(prelude=prelude, flags=argv)
        if ranks == 1:
            return [self.run(code)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self.run(code, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(ranks)]


def make_base(base: Path) -> None:
    "Fill a base folder with a little text and a tokenizer."
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(8, 60))) for _ in range(24)]
    (base / "data/tiny").mkdir(parents=True)
    for i, part in enumerate((documents[:16], documents[16:])):
        pq.write_table(pa.table({"text": part}), base / f"data/tiny/shard_{i:05d}.parquet")
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    Tokenizer.train(documents, 280).save()
    os.environ.pop("NANOCHAT_BASE_DIR")
    if before is not None:
        os.environ["NANOCHAT_BASE_DIR"] = before


# ---------------------------------------------------------------- runs to break

# 16 documents are an epoch of some 10 steps: every run passes edges of epochs, in the middle of
# steps too; a step has four micro-batches on one rank, two on each of two
TINY = {"data_dir": "tiny", "depth": 1, "max_seq_len": 64, "device_batch_size": 1,
        "total_batch_size": 256, "num_iterations": 24, "save_every": 1, "eval_every": 10,
        "eval_tokens": 256, "device_type": "cpu", "compile": 0, "resume": True}
WORDS = "the lighthouse keeper counted waves and ships that came home before the long night".split()

# preludes: what goes wrong in the fifth step, on one rank
NAN = {
    "loss": """
import torch
def poison(batches):
    inputs, targets, *_ = batches[1]
    batches[1] = (inputs, targets, torch.full(targets.shape, float("nan")))
""",
    "gradient": """
def poison(batches):
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
""",
    "weight": """
def poison(batches):
    model.transformer.h[0].attn.c_q.weight.data[1, 2] = float("nan")
"""}
POISON = """
import os
original_step, original_fit, calls = pretraining.train_step, pretraining.fit, []
def fit(the_model, *args, **kwargs):
    global model
    model = the_model
    return original_fit(the_model, *args, **kwargs)
def train_step(the_model, optimizer, batches, *args, **kwargs):
    calls.append(1)
    if len(calls) == 5 and os.environ.get("RANK", "0") == os.environ.get("POISONED", "0"):
        poison(batches)
    before = [p.clone() for p in optimizer.params]
    try:
        return original_step(the_model, optimizer, batches, *args, **kwargs)
    except common.Diverged:
        after = optimizer.params
        same = [(a == b).logical_or(a.isnan()).all() for a, b in zip(before, after)]
        print("untouched:", all(same))
        raise
pretraining.train_step, pretraining.fit = train_step, fit
"""
HANG = """
import os, time
original = pretraining.train_step
def train_step(*args, **kwargs):
    train_step.calls = getattr(train_step, "calls", 0) + 1
    if train_step.calls == 5 and os.environ["RANK"] == "1":
        print("<here>", flush=True)
        oversleep()
    return original(*args, **kwargs)
def oversleep():
    {how}
pretraining.train_step = train_step
"""
