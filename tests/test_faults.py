"""What can go wrong in a run, done to real processes: kills, signals, NaNs, hangs, full memory.

Every run here is the pretraining command with a tiny model; ranks are processes that talk by gloo.
"""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import HANG, NAN, POISON, TINY, TRAIN, WORDS, Forker, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanochat_nb.common import Diverged, RunLog, UserError
from nanochat_nb.faults import SpikeGuard, StopSignals, Watchdog, dump_batch, find_culprits
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import train_step


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    "A base folder with a little text and a tokenizer, and a server that starts runs in it."
    base = tmp_path_factory.mktemp("base")
    make_base(base)
    with Forker(base) as forker:
        yield forker


def rows(base: Path, name: str) -> list[dict]:
    "What a run logged, without what depends on the clock."
    path = base / "logs" / f"{name}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items()
             if key not in ("seconds", "tokens_per_second")} for line in lines]


def steps(base: Path, name: str) -> int:
    return sum("loss" in row for row in rows(base, name))


def checkpoint(base: Path, name: str, step: int) -> Path:
    return base / "checkpoints/base" / name / f"step_{step:06d}"


def state(folder: Path) -> dict:
    "All of a checkpoint that has to be equal: bytes of tensors, loader, random states."
    meta = json.loads((folder / "meta.json").read_text())
    kept = {key: meta[key] for key in ("step", "loader", "rng", "loss_scale", "spike_guard")}
    return kept | {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def assert_same_run(base: Path, name: str, other: str, step: int) -> None:
    first, second = (state(checkpoint(base, run, step)) for run in (name, other))
    assert first.keys() == second.keys()
    assert [key for key in first if first[key] != second[key]] == []
    assert rows(base, name) == rows(base, other)


def until(condition, children, seconds=180) -> None:
    "Wait for something to happen in running children."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, children[0].text()
        assert all(child.poll() is None for child in children), "\n".join(
            child.text() for child in children)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(forker):
    "The undisturbed runs, on one rank and on two."
    for ranks in (1, 2):
        for child in forker.train(TINY, ranks, name=f"straight{ranks}"):
            assert child.wait() == 0, child.text()
    meta = json.loads((checkpoint(forker.base, "straight1", 24) / "meta.json").read_text())
    assert meta["loader"]["epoch"] >= 2, "the test needs edges of epochs"
    return forker.base


# ---------------------------------------------------------------- killed, and started again


@pytest.mark.parametrize("ranks, kills, last", [(1, 20, 48), (2, 5, 24)])
def test_kills_at_random_moments_change_nothing(forker, straight, ranks, kills, last):
    """SIGKILL in training and in saving, the same command each time: the same bits in the end.

    On two ranks one of them is killed, and the other has to notice by itself.
    """
    seed = random.randrange(2**32)
    draw, name, in_saves = random.Random(seed), f"killed{ranks}", 0
    flags, undisturbed = TINY | {"num_iterations": last}, f"undisturbed{ranks}"
    for child in forker.train(flags, ranks, name=undisturbed):
        assert child.wait() == 0, child.text()
    folder = checkpoint(straight, name, 0).parent
    for _ in range(kills):
        goal = steps(straight, name) + draw.randint(ranks - 1, 2)
        left = set(folder.glob(".step_*.tmp"))
        children = forker.train(flags, ranks, name=name)
        if draw.random() < 0.5:      # in the middle of what comes after a step …
            until(lambda: steps(straight, name) >= goal, children)
            time.sleep(draw.uniform(0, 0.03))
        else:                        # … or in a save
            until(lambda: set(folder.glob(".step_*.tmp")) - left, children)
            time.sleep(draw.uniform(0, 0.01))
        draw.choice(children).send(signal.SIGKILL)
        codes = sorted(child.wait() for child in children)
        assert codes[0] == -9 and codes[1:] in ([], [4]), (seed, codes, children[0].text())
        in_saves += any(folder.glob(".step_*.tmp"))
    assert in_saves, "no kill fell into a save"
    assert steps(straight, name) < last, "the run was over before the last kill"
    for child in forker.train(flags, ranks, name=name):
        assert child.wait() == 0, child.text()
    assert_same_run(straight, name, undisturbed, last)


def test_resume_in_the_middle_and_at_another_world_size(forker, straight):
    "One rank goes on where two stopped, in the middle of an epoch: the same run, up to rounding."
    middle = TINY | {"save_every": 13}
    children = forker.train(middle, 2, name="moved")
    until(checkpoint(straight, "moved", 13).exists, children)
    for child in children:
        child.send(signal.SIGKILL)
        child.wait()
    child, = forker.train(middle, 1, name="moved")
    assert child.wait() == 0 and "resuming after step 13" in child.text()
    for mine, expected in zip(rows(straight, "moved"), rows(straight, "straight1"), strict=True):
        assert mine.keys() == expected.keys() and mine["step"] == expected["step"]
        assert mine.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-4)
    metas = [json.loads((checkpoint(straight, name, 24) / "meta.json").read_text())
             for name in ("moved", "straight1")]
    assert metas[0]["loader"] == metas[1]["loader"]


def test_torchrun_restarts_go_on(forker, straight):
    "A rank dies once: torchrun starts all ranks again, and --resume makes it the same run."
    prelude = """
import os, signal
original = pretraining.train_step
def train_step(*args, **kwargs):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        train_step.calls = getattr(train_step, "calls", 0) + 1
        if train_step.calls == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
pretraining.train_step = train_step
"""
    script = straight / "worker.py"
    flags = TINY | {"model_tag": "restarted", "run": "restarted"}
    argv = [part for key, value in flags.items()
            for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
    script.write_text(TRAIN.format(prelude=prelude, flags=argv))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=1", str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **forker.env})
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after step [5-7]\b", done.stdout), done.stdout
    assert_same_run(straight, "restarted", "straight2", 24)


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_saves_and_ends_for_another_start(forker, straight, ranks, number):
    "All ranks agree on the step, also if only the last was asked; then the run goes on to its end."
    name, flags = f"stopped{ranks}{number}", TINY | {"save_every": -1}
    children = forker.train(flags, ranks, name=name)
    until(lambda: steps(straight, name) >= 3, children)
    children[-1].send(number)
    assert [child.wait(60) for child in children] == [75] * ranks, children[0].text()
    saved, = checkpoint(straight, name, 0).parent.iterdir()
    step = json.loads((saved / "meta.json").read_text())["step"]
    assert 3 <= step < 24 and steps(straight, name) == step
    last = [child.text().strip().splitlines()[-1] for child in children]
    assert all(f"stopped after step {step} of 24, saved" in line for line in last), last
    told = f"{number.name}: stopping after this step; once more ends it at once"
    assert ranks > 1 or told in children[0].text()
    assert number.name in last[-1] and "Traceback" not in "".join(c.text() for c in children)
    for child in forker.train(TINY, ranks, name=name):
        assert child.wait() == 0, child.text()
    assert_same_run(straight, name, f"straight{ranks}", 24)


SLOW = {  # where the run is when the signal comes, and what makes it stay there for a second
    "evaluation": "pretraining.evaluate_bpb", "first step": "pretraining.train_step",
    "save": "checkpoint.Saver._write"}


@pytest.mark.parametrize("where", SLOW)
def test_a_signal_at_an_awkward_moment(forker, straight, where):
    "In an evaluation, before the first step is done, in a save: saved whole, exit 75."
    name = f"awkward-{where.replace(' ', '-')}"
    prelude = f"""
import time
from nanochat_nb import checkpoint
original = {SLOW[where]}
def slow(*args, **kwargs):
    print("<here>", flush=True)
    time.sleep(0.3)
    return original(*args, **kwargs)
{SLOW[where]} = slow
"""
    child, = forker.train(TINY | {"save_every": 5, "eval_every": 5}, prelude=prelude, name=name)
    until(lambda: "<here>" in child.text(), [child])
    child.send(signal.SIGTERM)
    assert child.wait(60) == 75, child.text()
    step = int(re.search(r"stopped after step (\d+)", child.text())[1])
    assert step == steps(straight, name) >= 1
    assert state(checkpoint(straight, name, step))["step"] == step
    child, = forker.train(TINY, name=name)
    assert child.wait() == 0
    assert rows(straight, name)[-1]["val_bpb"] == rows(straight, "straight1")[-1]["val_bpb"]


def test_a_signal_after_the_last_step_lets_the_run_end(forker, straight):
    prelude = """
import time
original = pretraining.evaluate_bpb
def slow(*args):
    print("<here>", flush=True)
    time.sleep(0.3)
    return original(*args)
pretraining.evaluate_bpb = slow
"""
    flags = TINY | {"num_iterations": 3, "eval_every": -1}
    child, = forker.train(flags, prelude=prelude, name="late")
    until(lambda: "<here>" in child.text(), [child])
    child.send(signal.SIGTERM)
    assert child.wait(60) == 0 and checkpoint(straight, "late", 3).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(forker, straight, number):
    "In the middle of a save that takes for ever: the checkpoint before it stays whole."
    name = f"twice{number}"
    prelude = """
import time
from nanochat_nb import checkpoint
original = checkpoint.Saver._write
def slow(self, temporary, *args):
    if "step_000006" in str(temporary):
        print("<here>", flush=True)
        time.sleep(60)
    return original(self, temporary, *args)
checkpoint.Saver._write = slow
"""
    child, = forker.train(TINY | {"save_every": 3}, prelude=prelude, name=name)
    until(lambda: "<here>" in child.text(), [child])
    child.send(number)
    time.sleep(0.05)
    child.send(number)                 # the same stop once more, as from Slurm and torchrun
    time.sleep(1.2)
    assert child.poll() is None
    child.send(number)
    assert child.wait(5) == 128 + number
    assert not checkpoint(straight, name, 6).exists()
    child, = forker.train(TINY, name=name)
    assert child.wait() == 0 and "resuming after step 3" in child.text()
    assert_same_run(straight, name, "straight1", 24)


def test_torchrun_passes_signals_on(forker, straight):
    "SIGTERM to the launcher: both ranks save the same step within its 30 seconds."
    flags = TINY | {"model_tag": "launched", "run": "launched", "num_iterations": 100_000,
                    "save_every": -1, "eval_every": -1}
    argv = [part for key, value in flags.items()
            for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "nanochat_nb.pretraining", "--", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **forker.env}, cwd=straight)
    deadline = time.monotonic() + 200
    while steps(straight, "launched") < 3:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    text, _ = launcher.communicate(timeout=120)
    step = int(re.search(r"SIGTERM: stopped after step (\d+) of 100000, saved", text)[1])
    assert text.count(f"stopped after step {step} ") == 2
    assert checkpoint(straight, "launched", step).exists()


def test_the_wish_to_stop_travels_in_no_message_of_its_own(forker, straight):
    "As many collectives in a step that asks as in one that does not."
    prelude = """
import torch.distributed as dist
original, calls = pretraining.train_step, []
for name in ("all_reduce", "all_gather_object", "broadcast", "barrier", "reduce_scatter_single",
             "all_gather_single", "reduce_scatter_tensor", "all_gather_into_tensor"):
    if hasattr(dist, name):
        def counted(*args, function=getattr(dist, name), **kwargs):
            calls.append(1)
            return function(*args, **kwargs)
        setattr(dist, name, counted)
def train_step(*args, stop, **kwargs):
    train_step.calls = getattr(train_step, "calls", 0) + 1
    before = len(calls)
    result = original(*args, stop=stop if train_step.calls % 2 else None, **kwargs)
    print("collectives", train_step.calls % 2, len(calls) - before)
    return result
pretraining.train_step = train_step
"""
    children = forker.train(TINY | {"num_iterations": 4}, 2, prelude=prelude, name="counted")
    assert [child.wait() for child in children] == [0, 0], children[0].text()
    found = re.findall(r"collectives (\d) (\d+)", children[0].text())
    assert [asked for asked, _ in found] == ["1", "0", "1", "0"]
    assert len({count for _, count in found}) == 1 and int(found[0][1]) > 3


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", NAN)
def test_not_a_number_ends_the_run_on_all_ranks(forker, straight, kind, ranks):
    "On the last rank only: no update anywhere, all name step and rank, it dumps its batch."
    name = f"nan-{kind}-{ranks}"
    prelude = NAN[kind] + POISON.replace('"POISONED", "0"', f'"POISONED", "{ranks - 1}"')
    children = forker.train(TINY, ranks, prelude=prelude, name=name)
    assert [child.wait() for child in children] == [3] * ranks, children[-1].text()
    guilty = ranks - 1
    blame = {"loss": f"rank {guilty}, micro-batch 1: the loss is nan",
             "gradient": f"rank {guilty}, micro-batch 0: the gradient of lm_head.weight",
             "weight": f"rank {guilty}, weight transformer.h.0.attn.c_q.weight is not finite"}[kind]
    for child in children:
        assert "untouched: True" in child.text() and "Traceback" not in child.text()
        line = child.text().strip().splitlines()[-1]
        assert line.startswith("error: step 4: ") and blame in line, line
        assert ("fault of the memory" in line) == (kind == "weight")
    folder = straight / "faults" / name
    dumped, = folder.glob("*.safetensors")
    assert dumped.stem == f"step_000004-rank_{guilty:05d}"
    batches, facts = load_file(dumped), json.loads(dumped.with_suffix(".json").read_text())
    assert sum(key.startswith("inputs") for key in batches) == 4 // ranks
    assert any(word in facts["texts"][0][0] for word in WORDS)
    assert blame.split(", ")[1].split(":")[0] in facts["found"][0]
    assert steps(straight, name) == 4
    assert state(checkpoint(straight, name, 4))["step"] == 4        # the good one stays


def test_a_passing_fault_is_told_from_a_bad_batch(forker, straight):
    "What is finite when it is repeated was a fault of the machine."
    once = 'float("inf") if first() else grad)'
    prelude = NAN["gradient"].replace('float("inf"))', once) + """
def first():
    calls.append(1)
    return len(calls) < 7
""" + POISON
    child, = forker.train(TINY, prelude=prelude, name="passing")
    assert child.wait() == 3
    assert "passing fault of the hardware" in child.text(), child.text()
    assert list((straight / "faults/passing").glob("step_000004-rank_00000.safetensors"))


def test_a_gradient_too_large_for_its_norm_is_found():
    "Finite numbers whose squares are not in fp32: that is no fault of the hardware."
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2,
                          n_embd=16)).init_weights(0)
    batch = torch.randint(0, 32, (2, 1, 8))
    model.lm_head.weight.register_hook(lambda grad: grad * 1e25)
    found, = find_culprits(model, setup_optimizer(model), [tuple(batch)])
    assert found == "micro-batch 0: the gradient of lm_head.weight, squared, is inf"


def test_a_batch_that_is_a_view_is_dumped(tmp_path, monkeypatch):
    "Inputs and targets of one row may share their memory, which safetensors refuses."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    row = torch.arange(9).view(1, 9)
    dump_batch(tmp_path / "dumped", [(row[:, :-1], row[:, 1:])], ["why"])
    loaded = load_file(tmp_path / "dumped.safetensors")
    assert torch.equal(loaded["inputs_0"], row[:, :-1])
    assert torch.equal(loaded["targets_0"], row[:, 1:])
    facts = json.loads((tmp_path / "dumped.json").read_text())
    assert facts == {"found": ["why"], "texts": None}


# ---------------------------------------------------------------- numbers that are too large


def test_spike_guard_refuses_what_stands_out_and_accepts_what_lasts():
    guard, draw = SpikeGuard(), random.Random(1)
    normal = [3 + draw.gauss(0, 0.1) for _ in range(200)]
    assert all(guard.accepts("loss", value) for value in normal) and guard.skipped == 0
    assert not guard.accepts("loss", 6.0) and guard.skipped == 1
    assert guard.accepts("loss", 3.1)
    refused = [guard.accepts("loss", 6.0) for _ in range(20)].count(False)
    assert 1 <= refused <= 6, "a lasting change must be accepted"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=300), st.lists(st.floats(0, 1e6), max_size=20))
def test_spike_guard_goes_on_from_its_state(before, after):
    first, second = SpikeGuard(), SpikeGuard()
    for value in before:
        first.accepts("loss", value)
        first.accepts("grad_norm", value / 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in after:
        assert first.accepts("loss", value) == second.accepts("loss", value)
    assert first.state_dict() == second.state_dict()
    assert first.limit("grad_norm") == second.limit("grad_norm")


@pytest.mark.parametrize("kind", ["loss", "grad_norm"])
def test_a_refused_step_changes_nothing(kind):
    model = GPT(GPTConfig(sequence_len=12, vocab_size=30, n_layer=1, n_head=2, n_kv_head=2,
                          n_embd=16)).init_weights(0)
    optimizer, guard = setup_optimizer(model), SpikeGuard(window=8)
    def batch(seed, weight=1.0):
        idx = torch.randint(30, (2, 13), generator=torch.Generator().manual_seed(seed))
        return [(idx[:, :-1], idx[:, 1:], torch.full((2, 12), weight))]
    for seed in range(8):
        train_step(model, optimizer, batch(seed), 0.1, guard=guard)
    assert guard.skipped == 0
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.state_dict()).items()}
    if kind == "loss":
        loss, norm = train_step(model, optimizer, batch(9, 100.0), guard=guard)
        assert math.isnan(norm) and loss > 100
    else:
        hook = model.lm_head.weight.register_hook(lambda grad: grad * 1000)
        loss, norm = train_step(model, optimizer, batch(9), guard=guard)
        assert loss < 5 and norm > 10
        hook.remove()
    assert guard.skipped == 1
    after = model.state_dict() | optimizer.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    train_step(model, optimizer, batch(10), guard=guard)
    assert guard.skipped == 1 and not torch.equal(before["lm_head.weight"], model.lm_head.weight)


SPIKES = """
import torch
original = pretraining.train_step
def train_step(model, optimizer, batches, *args, guard=None, **kwargs):
    train_step.calls = getattr(train_step, "calls", START) + 1
    if guard.recent["loss"].maxlen == 128:
        guard.recent = {kind: type(v)(v, maxlen=8) for kind, v in guard.recent.items()}
    if train_step.calls in (11, 23) and RANK == "0":
        batches = [(i, t, torch.full(t.shape, 50.0)) for i, t in batches]
    return original(model, optimizer, batches, *args, guard=guard, **kwargs)
pretraining.train_step = train_step
"""


def test_spike_guard_in_a_run(forker, straight):
    "Two ranks skip the same steps; stopped between them and started again, the count goes on."
    flags = TINY | {"spike_guard": True, "save_every": 15}
    prelude = "import os\nRANK, START = os.environ['RANK'], 0" + SPIKES
    for child in forker.train(flags, 2, prelude=prelude, name="spikes"):
        assert child.wait() == 0, child.text()
    last = [row for row in rows(straight, "spikes") if "loss" in row]
    assert [row["step"] for row in last if row["grad_norm"] is None] == [10, 22]
    assert last[-1]["skipped"] == 2
    weights = state(checkpoint(straight, "spikes", 24))
    whole = rows(straight, "spikes")
    for path in checkpoint(straight, "spikes", 24).iterdir():
        path.unlink()
    checkpoint(straight, "spikes", 24).rmdir()
    prelude = prelude.replace("START = os.environ['RANK'], 0", "START = os.environ['RANK'], 15")
    for child in forker.train(flags, 2, prelude=prelude, name="spikes"):
        assert child.wait() == 0, child.text()
    assert "resuming after step 15" in forker.children[-2].text()
    assert state(checkpoint(straight, "spikes", 24)) == weights
    assert rows(straight, "spikes") == whole


# ---------------------------------------------------------------- ranks that do not come


def test_a_rank_that_sleeps_is_named_with_its_stack(forker, straight):
    "It writes its stack itself before the timeout; after it both ranks end."
    flags = TINY | {"rank_timeout": 4}
    children = forker.train(flags, 2, prelude=HANG.format(how="time.sleep(600)"), name="sleeps")
    until(lambda: "<here>" in children[1].text(), children)
    began, stack = time.monotonic(), straight / "faults/sleeps/rank_00001.stack"
    until(lambda: "oversleep" in stack.read_text(), children, 4)     # both are still there
    assert [child.wait(60) for child in children] == [4, 4]
    assert time.monotonic() - began < 30
    line = children[0].text().strip().splitlines()[-1]
    assert re.search(r"error: rank 1 \(process \d+ on .*\) has stood in oversleep .* at step 4; "
                     r"its stack is in .*rank_00001.stack", line), line
    assert "Traceback" not in children[0].text()


def test_a_rank_that_is_stopped_is_named(forker, straight):
    "SIGSTOP: nothing of the rank runs any more, not even its threads."
    children = forker.train(TINY | {"rank_timeout": 4, "num_iterations": 100_000}, 2, name="frozen")
    until(lambda: steps(straight, "frozen") >= 5, children)
    children[1].send(signal.SIGSTOP)
    assert children[0].wait(60) == 4
    line = children[0].text().strip().splitlines()[-1]
    assert re.search(r"error: rank 1 \(process \d+ on .*\) has been silent for", line), line
    children[1].send(signal.SIGKILL)


def test_a_rank_that_is_killed_is_named(forker, straight):
    flags = TINY | {"num_iterations": 100_000}
    children = forker.train(flags, 2, name="dead")
    until(lambda: steps(straight, "dead") >= 5, children)
    children[1].send(signal.SIGKILL)
    assert children[1].wait() == -9 and children[0].wait(60) == 4
    line = children[0].text().strip().splitlines()[-1]
    assert f"its process {children[1].pid} is gone" in line, line
    assert "lost rank 1, last seen" in line, line
    assert "Traceback" not in children[0].text()


def test_an_exception_on_one_rank_gives_one_traceback(forker, straight):
    "The other rank says in one line who ended and with what."
    prelude = HANG.format(how='raise ZeroDivisionError("a bug")')
    children = forker.train(TINY, 2, prelude=prelude, name="bug")
    assert [child.wait(60) for child in children] == [4, 1]
    assert children[1].text().count("Traceback") == 1 and "oversleep" in children[1].text()
    line = children[0].text().strip().splitlines()[-1]
    assert "lost rank 1 at step 4: it ended with ZeroDivisionError: a bug" in line, line
    assert "Traceback" not in children[0].text()


def test_a_rank_that_comes_late_is_waited_for(forker, straight):
    "Slower than the others, but within the timeout: nothing happens, and nothing is left behind."
    flags = TINY | {"rank_timeout": 20, "num_iterations": 8}
    children = forker.train(flags, 2, prelude=HANG.format(how="time.sleep(2)"), name="late-rank")
    assert [child.wait() for child in children] == [0, 0]
    assert list((straight / "faults/late-rank").iterdir()) == []


def test_a_rank_that_comes_while_it_is_accused_is_spared(forker, straight):
    "The others look around for a moment before they give up; who comes meanwhile is welcome."
    prelude = HANG.format(how="""
    go = common.base_dir() / "go"
    while not go.exists():
        time.sleep(0.01)""") + """
original_accuse = faults.Watchdog.accuse
def accuse(*args):
    (common.base_dir() / "go").touch()
    time.sleep(0.3)
    return original_accuse(*args)
faults.Watchdog.accuse = accuse
"""
    flags = TINY | {"rank_timeout": 2, "num_iterations": 80, "save_every": -1, "eval_every": -1}
    children = forker.train(flags, 2, prelude=prelude, name="spared")
    assert [child.wait() for child in children] == [0, 0], children[0].text()
    assert (straight / "go").exists()


def test_a_broken_connection_blames_no_innocent_rank(forker, straight):
    "Both see the network fail and ask who is to blame: each tells what it saw, not the other."
    prelude = HANG.replace(' and os.environ["RANK"] == "1"', "").format(
        how='raise RuntimeError("NCCL error: unhandled\\nLast error: no route to host")')
    children = forker.train(TINY | {"rank_timeout": 8}, 2, prelude=prelude, name="network")
    assert [child.wait(60) for child in children] == [4, 4]
    for child in children:
        assert "no route to host" in child.text() and "silent" not in child.text(), child.text()


ONE_OF_TWO = """
import time, torch.distributed as dist
from nanochat_nb import common, faults
dist.broadcast_object_list = lambda *args, **kwargs: None      # rank 0 of 2; there is no rank 1
space = {{"time": time}}
code = "def {function}(times):\\n    for _ in range(times):\\n        time.sleep(0.1)"
exec(compile(code, "/somewhere/{file}", "exec"), space)
with faults.Watchdog("one-of-two", timeout={timeout}, world_size=2):
    print("<here>", flush=True)
    space["{function}"]({times})
"""
WAITING = [("distributed_c10d.py", "all_reduce"), ("faults.py", "wait_for_all"),
           ("optimizer.py", "step")]


@pytest.mark.parametrize("file, function", [*WAITING, ("gpt.py", "forward")])
def test_who_stands_in_a_collective_waits(forker, file, function):
    "Elsewhere a rank works and has all the time it needs: it compiles, evaluates, is debugged."
    child = forker.run(ONE_OF_TWO.format(file=file, function=function, timeout=0.6, times=20))
    waits = (file, function) in WAITING
    assert child.wait(20) == (4 if waits else 0), child.text()
    assert ("the ranks wait for each other" in child.text()) == waits


def test_a_paused_machine_is_not_late(forker):
    "SIGSTOP for longer than the timeout, as a queue does that suspends jobs; then it goes on."
    child = forker.run(ONE_OF_TWO.format(file="gpt.py", function="wait_for_all", timeout=2,
                                         times=12))
    until(lambda: "<here>" in child.text(), [child])
    time.sleep(0.3)
    child.send(signal.SIGSTOP)
    time.sleep(2.2)
    child.send(signal.SIGCONT)
    assert child.wait(20) == 0, child.text()


def test_another_run_of_the_same_name_is_no_reason_to_end(forker, straight):
    file = straight / "faults/one-of-two/rank_00001.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"launch": "another", "step": 1, "ended": "ZeroDivisionError: x"}))
    child = forker.run(ONE_OF_TWO.format(file="gpt.py", function="wait_for_all", timeout=1,
                                         times=8))
    assert child.wait(20) == 0, child.text()


def beat(**values) -> dict:
    return {"step": 7, "where": "f (x.py:1)", "waiting": True, "still": 9.0, "ended": "", "pid": 1,
            "host": "far", "machine": "far", "written": time.time()} | values


@pytest.mark.parametrize("beats, verdict", [
    (lambda: {1: beat(ended="a victim"), 2: beat(ended="OSError: disk")},
     "lost rank 2 at step 7: it ended with OSError: disk"),
    (lambda: {1: beat(), 2: beat(written=123.0, waiting=False)}, "rank 2 .* has been silent"),
    (lambda: {1: beat(waiting=False, still=0.2), 2: beat(waiting=False)},
     r"rank 2 .* has stood in f \(x.py:1\) for 9.0 s .* raise --rank_timeout"),
    (lambda: {1: beat(), 2: beat(ended="a victim", waiting=False)}, "wait for each other"),
    (lambda: {1: beat(machine="here", pid=2**22 + 1)}, "its process 4194305 is gone"),
    (lambda: {1: beat(machine="here", pid=os.getpid())}, "wait for each other"),
])
def test_verdicts(tmp_path, monkeypatch, beats, verdict):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    watchdog = Watchdog("run", timeout=0.2, world_size=3)
    watchdog.about = {"machine": "here"}
    monkeypatch.setattr(watchdog, "_others", beats)
    assert re.search(verdict, watchdog.accuse())


# ---------------------------------------------------------------- not enough memory


@pytest.mark.parametrize("extra", [{}, {"device_batch_size": 1}])
def test_out_of_memory_names_the_flags(forker, straight, extra):
    "A real failure of the allocator: one line, with flags that give the same total batch."
    prelude = """
import resource
from nanochat_nb import checkpoint
original = pretraining.fit
def fit(*args, **kwargs):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 10**6,) * 2)
    return original(*args, **kwargs)
pretraining.fit = fit
""".replace("MEGABYTES", "50" if extra else "120")
    flags = TINY | {"device_batch_size": 96, "total_batch_size": 96 * 512, "max_seq_len": 512,
                    "chunk_tokens": 0, "num_iterations": 2} | extra
    if extra:
        flags |= {"max_seq_len": 16_000, "total_batch_size": 16_000, "eval_tokens": 16_000}
    child, = forker.train(flags, prelude=prelude, name=f"memory{len(extra)}")
    assert child.wait() == 2, child.text()
    line = child.text().strip().splitlines()[-1]
    assert "Traceback" not in child.text()
    if extra:
        assert re.search(r"out of memory at device_batch_size=1 \(estimate [\d.]+ GB\); try "
                         r"--activation_checkpointing \(estimate", line), line
    else:
        size = r"\(estimate ([\d.]+) GB\)"
        found = re.search(f"out of memory at device_batch_size=96 {size}; try --device_batch_size=48 "
                          f"--total_batch_size=49152 {size}, then with --activation_checkpointing "
                          f"as well {size}", line)
        assert found, line
        assert float(found[1]) > float(found[2]) > float(found[3])


# ---------------------------------------------------------------- the log


@given(st.integers(0, 12), st.integers(0, 12), st.text("x{", max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_log_that_is_rewound_has_every_step_once(tmp_path_factory, crashed, again, half):
    "Killed after some steps, perhaps within a line; gone on from an earlier one."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("log")))
        log = RunLog("run")
        for step in range(crashed):
            log.write(step=step, loss=1 / (step + 3))
        if half and crashed:
            with open(log.path, "a") as f:
                f.write(half)
        start, log = min(again, crashed), RunLog("run")
        assert [row["step"] for row in log.rewind(start)] == list(range(start))
        for step in range(start, 15):
            log.write(step=step, loss=1 / (step + 3))
        found = log.read()
        expected = [(step, 1 / (step + 3)) for step in range(15)]
        assert [(row["step"], row["loss"]) for row in found] == expected
        seconds = [row["seconds"] for row in found]
        assert seconds == sorted(seconds)


def test_exit_codes_are_distinct():
    from nanochat_nb import faults
    codes = [UserError.exit_code, Diverged.exit_code, faults.RankLost.exit_code,
             faults.Stopped.exit_code]
    assert codes == [2, 3, 4, 75] and not issubclass(faults.Stopped, Exception)


def test_signals_outside_the_main_thread_are_left_alone():
    import threading
    before = signal.getsignal(signal.SIGTERM)
    def enter():
        with StopSignals() as stop:
            assert signal.getsignal(signal.SIGTERM) is before and not stop.requested
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
