"""Checkpoints that survive kills, damage, full disks and another number of ranks."""
import copy
import gc
import json
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nanochat_nb.checkpoint as checkpoint
from nanochat_nb.checkpoint import (Saver, check_tokenizer, copy_to_host, file_sha256,
                                    find_checkpoint, find_damage, load_model,
                                    load_optimizer_state, load_weights, newest_for_all, read_meta,
                                    rng_state, save_checkpoint, set_rng_state, write_tensors)
from nanochat_nb.common import Compute, UserError, seed_everything
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.tokenizer import Tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def tiny_model(seed=0, **changes):
    return GPT(GPTConfig(**{**CONFIG.to_dict(), **changes})).init_weights(seed=seed)


def rewrite_manifest(path):
    "What an attacker or a careless editor would do: make the manifest agree with the files."
    meta = json.loads((path / "meta.json").read_text())
    meta["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)}
                     for p in path.glob("*.safetensors")}
    meta.pop("sha256")
    (path / "meta.json").write_text(json.dumps(meta))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


# ----------------------------------------------------------------------------- kill

KILLS = """
import os, random, signal, sys, time
import torch
import nanochat_nb.checkpoint as checkpoint
from nanochat_nb.checkpoint import Saver, find_checkpoint, read_meta, save_checkpoint
from nanochat_nb.gpt import GPT, GPTConfig
from safetensors.torch import load_file
torch.set_num_threads(1)
model = GPT(GPTConfig(sequence_len=8, vocab_size=4096, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))

class State:
    def state_dict(self):
        return {f"{name}|momentum": p.detach() for name, p in model.named_parameters()}

def fill(value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_child(work):
    "Run work(report) in a process of its own, which may kill itself: its id, what it reports."
    sys.stdout.flush()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        try:
            work(lambda *words: os.write(write, (" ".join(map(str, words)) + "\\n").encode()))
        finally:
            os._exit(9)
    os.close(write)
    return pid, os.fdopen(read)

def whole(step, tag):
    "The newest checkpoint is of one step, at least this one."
    path = find_checkpoint("base", tag, verify="all")
    found = read_meta(path)["step"]
    assert found >= step, (found, step)
    for file in path.glob("*.safetensors"):
        for tensor in load_file(file).values():
            assert (tensor == found).all(), f"{file.name} mixes steps"
    return found
"""

RANDOM_KILLS = KILLS + """
def run(way, start):
    def work(report):
        with Saver("base", way) as saver:
            for step in range(start, 10**6):
                fill(step)
                report("saving", step)
                saver.save(step, model, State())     # waits for the save before
                report("saved", step - 1)
                if way == "waiting":
                    saver.wait()
                    report("saved", step)
                fill(-step)                          # training goes on while the thread writes
                if way == "background":
                    time.sleep(random.uniform(0, 0.02))
    return in_child(work)

random.seed(time.time_ns())
for way in ("background", "waiting"):
    start = interrupted = 1
    for _ in range(15):
        pid, reports = run(way, start)
        assert reports.readline().startswith("saving")
        time.sleep(random.uniform(0, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lines = [line.split() for line in reports.read().split("\\n") if line.count(" ") == 1]
        reported = max([int(step) for word, step in lines if word == "saved"], default=start - 1)
        folder = checkpoint.checkpoint_folder("base", way)
        interrupted += any(folder.glob(".step_*"))
        start = whole(reported, way) + 1 if reported else start
    print(way, interrupted - 1, "of 15 kills fell into a save;", start - 1, "saves")
    assert interrupted > 1, "no kill fell into a save: the test tested nothing"
"""


def run_script(text, base, timeout=180):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base)}
    return subprocess.run([sys.executable, "-c", text], text=True, capture_output=True,
                          env=environment, timeout=timeout)


def test_sigkill_at_random_moments(base):
    "Killed at random moments, the newest checkpoint is whole and at least the last reported saved."
    result = run_script(RANDOM_KILLS, base)
    assert result.returncode == 0, result.stdout + result.stderr


STAGED_KILLS = KILLS + """
def at(stage):
    "Arrange for a SIGKILL in the middle of a stage of a save."
    real_write, real_atomic = checkpoint.write_tensors, checkpoint.atomic_write
    real_rename, real_rmtree = checkpoint.Path.rename, checkpoint.shutil.rmtree
    def write(path, tensors):
        if path.name.startswith(stage):
            path.write_bytes(b"half")
            die()
        return real_write(path, tensors)
    def atomic(path, data):
        if path.name.startswith(stage):
            path.with_name(".half").write_text("half")
            die()
        return real_atomic(path, data)
    def rename(self, target):
        if stage == ("new" if self.name.endswith(".tmp") else str(target)[-3:]):
            die()
        return real_rename(self, target)
    def rmtree(path, **options):
        if stage == "deleting" and path.name.endswith(".deleted"):
            (path / "model.safetensors").unlink()
            die()
        return real_rmtree(path, **options)
    checkpoint.write_tensors, checkpoint.atomic_write = write, atomic
    checkpoint.Path.rename, checkpoint.shutil.rmtree = rename, rmtree
    if stage.startswith("_"):
        setattr(checkpoint, stage, lambda *args: die())

STAGES = {2: ("model", "meta", "old", "new", "_retire"),  # the same step once more
          3: ("optimizer", "rank", "_publish", "new", "deleting")}  # the next one
for second, stages in STAGES.items():
    for stage in stages:
        tag = f"{stage}{second}"
        for step in (1, 2):
            fill(step)
            save_checkpoint("base", tag, step, model, State())
        def work(report):
            at(stage)
            fill(second + 10)
            with Saver("base", tag) as saver:
                saver.save(second, model, State())
                fill(-1)
            report("survived")
        pid, reports = in_child(work)
        survived = reports.read()
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and not survived, (tag, status, survived)
        path = find_checkpoint("base", tag, verify="all")
        published = stage in ("_retire", "deleting")
        assert path.name.startswith(f"step_00000{second if published else 2}"), tag
        expected = second + 10 if published else 2
        for file in path.glob("*.safetensors"):
            assert all((t == expected).all() for t in load_file(file).values()), (tag, file)
        folder = path.parent
        assert any(folder.glob(".step_*")) == (stage != "_retire"), tag
        fill(4)
        save_checkpoint("base", tag, 4, model, State(), keep=1)   # goes on, and cleans up
        assert [p.name for p in folder.iterdir()] == ["step_000004"], tag
"""


def test_sigkill_in_every_stage(base):
    "The same at chosen points of a background save, also where a step is saved a second time."
    result = run_script(STAGED_KILLS, base)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_killed_run_left_a_folder_for_the_same_step(base, monkeypatch):
    "Nothing in it, least of all the notes of ranks that are done, is taken for this run's."
    with monkeypatch.context() as patch:  # as far as the folder goes, a kill before the rename
        patch.setattr(checkpoint, "_publish", no_space)
        patch.setattr(Saver, "_give_up", lambda *arguments: None)
        save_checkpoint("base", "t", 2, tiny_model())
    stale, = (base / "checkpoints/base/t").iterdir()
    for name in ("rank-00001.json", "optimizer-00001-of-00002.safetensors"):
        (stale / name).write_text("{}")
    path = save_checkpoint("base", "t", 2, tiny_model())
    assert find_damage(path, "all") == "" and names(path.parent) == ["step_000002"]
    assert names(path) == ["meta.json", "model.safetensors"]


# ----------------------------------------------------------------------------- background


class Gate:
    "A `write_tensors` that waits until it is let through, as a slow disk would."

    def __init__(self, monkeypatch):
        self.open, self.now, self.most = threading.Event(), 0, 0
        monkeypatch.setattr(checkpoint, "write_tensors", self)

    def __call__(self, path, tensors):
        self.now += 1
        self.most = max(self.most, self.now)
        assert self.open.wait(30)
        self.now -= 1
        return write_tensors(path, tensors)


def test_background_save_is_a_snapshot(monkeypatch):
    "Files written while training goes on are bit for bit those of a save that waited."
    seed_everything(4)
    model, loader = tiny_model(), {"rows": [1, 2]}
    optimizer = setup_optimizer(model)
    step_once(model, optimizer, 0)
    before = copy.deepcopy(model)
    waited = save_checkpoint("base", "waited", 1, model, optimizer, {"loader": loader})
    gate = Gate(monkeypatch)
    with Saver("base", "background") as saver:
        path = saver.save(1, model, optimizer, {"loader": loader})
        for step in range(1, 5):
            step_once(model, optimizer, step)
        loader["rows"].append(3)
        torch.rand(3)
        assert not path.exists() and not same(model, before)
        gate.open.set()
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        assert (path / name).read_bytes() == (waited / name).read_bytes()
    one, two = read_meta(path), read_meta(waited)
    for key in ("loader", "rng", "step", "config", "files"):
        assert one[key] == two[key], key
    assert one["loader"] == {"rows": [1, 2]} and find_damage(path, "all") == ""


def test_one_save_in_flight(monkeypatch):
    gate, model = Gate(monkeypatch), tiny_model()
    with Saver("base", "t") as saver:
        saver.save(1, model)
        threading.Timer(0.3, gate.open.set).start()
        assert not gate.open.is_set()
        second = saver.save(2, model)
        assert gate.open.is_set(), "the second save did not wait for the first"
    assert gate.most == 1 and names(second.parent) == ["step_000001", "step_000002"]


def test_host_memory_is_used_again():
    model = tiny_model()
    optimizer = setup_optimizer(model)

    def places():
        return {(file, name): t.data_ptr() for file, tensors in saver.copies.items()
                for name, t in tensors.items()}
    with Saver("base", "t") as saver:
        saver.save(1, model, optimizer)
        first = places()
        saver.save(2, model, optimizer)
        assert len(saver.copies) == 2 and places() == first
        assert not set(first.values()) & {p.data_ptr() for p in model.parameters()}
        saver.save(3, model)
        assert list(saver.copies) == ["model.safetensors"]
    assert list(read_meta(find_checkpoint("base"))["files"]) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16,
                                   torch.int64, torch.uint8, torch.bool])
def test_tensors_of_all_kinds_come_back(base, dtype):
    "Views, scalars and empty ones too; memory of another shape or dtype is not used again."
    tensors = {"plain": torch.arange(12).view(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype),
               "empty": torch.zeros(0, 3, dtype=dtype)}
    tensors |= {"turned": tensors["plain"].T, "slice": tensors["plain"][:, 1:3]}
    earlier = {"plain": torch.zeros(4, 3, dtype=dtype), "turned": torch.zeros(4, 3).double()}
    entry = write_tensors(base / "x", copy_to_host(tensors, earlier))
    back = load_file(base / "x")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name
    assert entry == {"bytes": (base / "x").stat().st_size, "sha256": file_sha256(base / "x")}
    assert names(base) == ["x"] and (base / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu():
    tensors = {"a": torch.randn(1000, 1000), "b": torch.arange(5), "c": torch.randn(3, 4).T}
    copies = copy_to_host({name: t.cuda() for name, t in tensors.items()})
    assert all(copies[name].is_pinned() and torch.equal(copies[name], tensors[name])
               for name in tensors)


# ----------------------------------------------------------------------------- full disk, failures


def test_disk_full_in_the_middle_of_a_run(base, monkeypatch, capsys):
    "Told when it happens, the old checkpoint stays, the run and the next save go on."
    model = tiny_model()
    with Saver("base", "t") as saver:
        first = saver.save(1, model)
        saver._join()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_tensors", no_space)
            saver.save(2, model)
            saver._join()
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "step_000002 not saved" in out and "No space left" in out
        assert find_checkpoint("base", verify="all") == first
        assert names(first.parent) == [first.name]  # no half file is left
        third = saver.save(3, model)
    assert find_checkpoint("base", verify="all") == third and capsys.readouterr().out == ""


@pytest.mark.parametrize("part", ["write_tensors", "atomic_write", "_publish", "sync_to_disk"])
def test_disk_full_in_the_last_save(base, monkeypatch, part, capsys):
    model = tiny_model()
    first = save_checkpoint("base", "t", 1, model)
    saver = Saver("base", "t")
    monkeypatch.setattr(checkpoint, part, no_space)
    with pytest.raises(UserError, match="rank 0: .*No space left.*untouched"):
        saver.save(2, model)
        saver.wait()
    assert find_checkpoint("base", verify="all") == first and names(first.parent) == [first.name]
    saver.wait()  # raised once
    assert capsys.readouterr().out.count("\n") == 1


def test_too_little_room_is_seen_before_it_is_filled(base, monkeypatch):
    free = checkpoint.shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(checkpoint, "write_tensors", None)  # not even begun
    with pytest.raises(UserError, match=r"No space left on device: [\d,]+ bytes needed, 1,000"):
        save_checkpoint("base", "t", 2, tiny_model())


REAL_LIMIT = """
import os, resource, sys, threading
import torch
import nanochat_nb.checkpoint as checkpoint
from nanochat_nb.checkpoint import Saver, find_checkpoint
from nanochat_nb.gpt import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(sequence_len=8, vocab_size=4096, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
trained = 0
try:
    with Saver("base", "t") as saver:
        saver.save(1, model)
        saver._join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))   # real: the kernel refuses
        saver.save(2, model)
        model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
        trained += 1
        saver.save(3, model)
except Exception as error:
    print(type(error).__name__, error)
print(trained, find_checkpoint("base", verify="all").name, *os.listdir(saver.folder))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpoint.write_tensors = lambda path, tensors: threading.Event().wait()   # a disk that hangs
checkpoint.GRACE = 0.2
try:
    with Saver("base", "t") as saver:
        saver.save(4, model)
        raise KeyError("something else")
except KeyError:
    print("leaves")
Saver("base", "t").save(5, model)
print("ends", flush=True)
"""


def test_real_limit_and_a_disk_that_hangs(base):
    "A write that the kernel refuses; then one that never returns, which must not hang the exit."
    result = run_script(REAL_LIMIT, base)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line, start in zip(lines, ("warning: checkpoint step_000002 not saved (rank 0: ",
                                   "warning: checkpoint step_000003 not saved (rank 0: ",
                                   "UserError checkpoint not saved (rank 0: ")):
        assert line.startswith(start) and "File too large" in line
    assert lines[3:] == ["1 step_000001 step_000001", "leaves", "ends"]


def test_what_cannot_be_copied_fails_like_a_full_disk(base, monkeypatch, capsys):
    "No host memory left: told, and the run goes on."
    model, saver = tiny_model(), Saver("base", "t")

    def no_memory(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "copy_to_host", no_memory)
        saver.save(1, model)
        saver._join()
    assert "step_000001 not saved (rank 0: DefaultCPUAllocator" in capsys.readouterr().out
    path = saver.save(2, model)
    saver.wait()
    assert find_checkpoint("base") == path


def test_the_part_of_a_lost_rank_is_not_waited_for(base, monkeypatch):
    "An error that says so ends the wait at once, not after `GRACE` or `timeout`."
    class Lost(UserError):
        exit_code = 4
    monkeypatch.setattr(checkpoint, "GRACE", 10.0)
    saver = Saver("base", "t")
    saver.world_size = 2     # the other one never comes
    with pytest.raises(Lost):
        with saver:
            saver.save(1, tiny_model())
            raise Lost("rank 1")
    assert not saver.thread.is_alive() and "rank 1: nothing written" in saver.error
    assert names(saver.folder) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_all_is_on_the_disk_before_it_has_its_name(base, monkeypatch):
    "Every file and the folder are synced before the rename, the folders above it afterwards."
    events, fsync, rename = [], os.fsync, checkpoint.Path.rename

    def note_sync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note_rename(self, target):
        events.append("rename")
        return rename(self, target)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(checkpoint.Path, "rename", note_rename)
    model = tiny_model()
    path = save_checkpoint("base", "t", 1, model, setup_optimizer(model))
    before, after = events[:events.index("rename")], events[events.index("rename") + 1:]
    for name in names(path):
        assert any(name in os.path.basename(event) for event in before), name
    assert before[-1].endswith(".tmp") and after == [str(folder) for folder in path.parents[:4]]


def test_an_exception_in_the_run_waits_for_the_save(base):
    "A save in flight when an evaluation fails is not lost, and the cause is what is raised."
    with pytest.raises(ZeroDivisionError):
        with Saver("base", "t") as saver:
            path = saver.save(1, tiny_model())
            1 / 0
    assert find_checkpoint("base", verify="all") == path


# ----------------------------------------------------------------------------- damage


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def damage_flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def damage_remove(file):
    file.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json",
                                  "optimizer-00000-of-00001.safetensors"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove])
def test_damaged_checkpoint_is_passed_over(damage, name, capsys):
    model = tiny_model()
    first = save_checkpoint("base", "t", 1, model, setup_optimizer(model))
    second = save_checkpoint("base", "t", 2, model, setup_optimizer(model))
    damage(second / name)
    assert find_damage(second, "all")
    assert find_checkpoint("base", "t", verify="all") == first
    assert "base/" not in first.name and "step_000002" in capsys.readouterr().out
    if damage is not damage_flip or name == "meta.json":
        assert find_checkpoint("base", "t") == first
    with pytest.raises(UserError, match="no whole checkpoint.*step_000002"):
        find_checkpoint("base", "t", step=2, verify="all")


def test_any_flipped_bit_of_the_notes_is_seen():
    path = save_checkpoint("base", "t", 1, tiny_model(), meta={"loader": {"row": 8}, "x": 1.5e-7})
    good = (path / "meta.json").read_bytes()
    known = json.loads(good)
    random.seed(5)
    own_name = good.rindex(b'"sha256"')  # without that entry it reads as an older release's
    places = [n for n in range(len(good)) if not own_name <= n < own_name + 8]
    for place in random.sample(places, 400):
        flipped = bytearray(good)
        flipped[place] ^= 1 << random.randrange(8)
        (path / "meta.json").write_bytes(flipped)
        try:
            seen = bool(find_damage(path))
        except UserError:
            seen = True  # another format_version
        try:
            harmless = json.loads(flipped) == known  # 1e-07 and 1E-07
        except ValueError:
            harmless = False
        assert seen or harmless, (place, bytes(flipped[place - 10:place + 10]))


def test_a_manifest_of_no_use_is_damage(base, capsys):
    first = save_checkpoint("base", "t", 1, tiny_model())
    for files in (3, {}, {"model.safetensors": 3}, {"model.safetensors": {"bytes": "many"}},
                  {"model.safetensors": {}, "../../x": {}}):
        second = save_checkpoint("base", "t", 2, tiny_model())
        meta = json.loads((second / "meta.json").read_text())
        meta.pop("sha256")
        (second / "meta.json").write_text(json.dumps({**meta, "files": files}))
        assert find_damage(second) and find_checkpoint("base", "t") == first


def test_unreadable_file_is_damage(base, monkeypatch):
    "A disk that answers EIO is passed over like a file that is too short."
    first = save_checkpoint("base", "t", 1, tiny_model())
    second = save_checkpoint("base", "t", 2, tiny_model())

    def sick(path):
        if path.parent == second:
            raise OSError(5, "Input/output error")
        return file_sha256(path)
    monkeypatch.setattr(checkpoint, "file_sha256", sick)
    assert find_checkpoint("base", "t", verify="all") == first


def test_checkpoints_of_the_release_before_still_load(base):
    "Format 1 as it was written before meta.json had a hash of its own."
    model = tiny_model()
    optimizer = setup_optimizer(model)
    path = save_checkpoint("base", "t", 1, model, optimizer)
    for name, tensors in (("model", model.state_dict()),
                          ("optimizer-00000-of-00001", optimizer.state_dict())):
        save_file({key: t.detach().contiguous() for key, t in tensors.items()},
                  path / f"{name}.safetensors")
    rewrite_manifest(path)
    assert find_checkpoint("base", "t", verify="all") == path == newest_for_all("base", "t")
    other = tiny_model(seed=3)
    load_weights(path, other)
    setup_optimizer(other).load_state_dict(load_optimizer_state(path))
    assert same(other, model)


def test_all_damaged_names_the_command():
    path = save_checkpoint("mid", "t", 1, tiny_model())
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing.*finetuning --stage mid"):
        find_checkpoint("mid")


@pytest.mark.parametrize("stage, command", list(checkpoint.MADE_BY.items()))
def test_missing_checkpoint_names_the_command(stage, command):
    with pytest.raises(UserError, match=command):
        find_checkpoint(stage)


def test_unknown_format_version():
    path = save_checkpoint("base", "t", 1, tiny_model())
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99.*reads 1"):
        find_checkpoint("base")


def test_bad_stage_and_tag():
    with pytest.raises(UserError, match="base, mid, sft, rl"):
        find_checkpoint("final")
    for tag in ("../x", "a/b", ".hidden", "a b"):
        with pytest.raises(UserError, match="model tag"):
            find_checkpoint("base", tag)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_refused(base, monkeypatch):
    monkeypatch.chdir(base)
    path = save_checkpoint("base", "t", 1, tiny_model())
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    rewrite_manifest(path)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(find_checkpoint("base"), tiny_model())
    folder = base / "checkpoints" / "sft" / "d4"
    folder.mkdir(parents=True)
    (folder / "model_000100.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="there is no sft checkpoint"):
        find_checkpoint("sft", "d4")
    assert not (base / "exploded").exists()


@pytest.mark.parametrize("content", [b"", bytes(64), b"\xff" * 8 + b"{}",
                                     b"\x10" + bytes(7) + b"{"])
def test_not_safetensors(content):
    path = save_checkpoint("base", "t", 1, tiny_model())
    (path / "model.safetensors").write_bytes(content)
    rewrite_manifest(path)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(path, tiny_model())


def change(tensors, kind):
    name = "lm_head.weight"
    if kind == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif kind == "missing":
        del tensors[name]
    else:
        tensors["surprise"] = torch.zeros(2)
    return tensors


@pytest.mark.parametrize("kind, message", [
    ("shape", r"lm_head.weight \(31, 16\), expected \(32, 16\)"),
    ("missing", r"lm_head.weight absent, expected \(32, 16\)"),
    ("extra", r"surprise \(2,\), expected absent")])
def test_weights_that_do_not_fit(kind, message):
    path = save_checkpoint("base", "t", 1, tiny_model())
    file = path / "model.safetensors"
    save_file(change(load_file(file), kind), file)
    rewrite_manifest(path)
    model = tiny_model(seed=3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        load_weights(path, model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before)), "half loaded"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_not_saved(base, dtype, value):
    model = tiny_model()
    first = save_checkpoint("base", "t", 1, model)
    model.to(dtype).lm_head.weight.data[0, 0] = value
    with pytest.raises(UserError, match="not finite at step 2"):
        save_checkpoint("base", "t", 2, model)
    assert find_checkpoint("base") == first
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_meta_that_is_no_json():
    with pytest.raises(UserError, match="JSON serializable"):
        save_checkpoint("base", "t", 1, tiny_model(), meta={"loader": object()})


# ----------------------------------------------------------------------------- contents


def test_newest_is_the_last_saved_and_old_ones_go():
    model = tiny_model()
    for step in (10, 20, 30):
        save_checkpoint("base", "a", step, model, keep=2)
    folder = find_checkpoint("base", "a").parent
    assert sorted(p.name for p in folder.iterdir()) == ["step_000020", "step_000030"]
    again = save_checkpoint("base", "a", 5, model, keep=2)  # a fresh run under an old name
    assert find_checkpoint("base", "a") == again
    other = save_checkpoint("base", "b", 1, model)
    assert find_checkpoint("base") == other and find_checkpoint("base", "a") == again
    assert find_checkpoint("base", "a", step=30).name == "step_000030"
    with pytest.raises(UserError, match="there is 5, 30"):
        find_checkpoint("base", "a", step=10)
    for step in range(100, 105):
        save_checkpoint("base", "all", step, model, keep=0)
    assert len(list(find_checkpoint("base", "all").parent.iterdir())) == 5


def fake(folder, step, saved_at):
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"")
    files = {"model.safetensors": {"bytes": 0, "sha256": ""}}
    (path / "meta.json").write_text(json.dumps({"format_version": 1, "saved_at": saved_at,
                                                "step": step, "files": files}))
    return path


@given(st.lists(st.integers(0, 40), unique=True, max_size=9), st.integers(0, 4), st.integers(0, 9),
       st.sets(st.integers(0, 8)))
@settings(max_examples=60, deadline=None)
def test_retention(tmp_path_factory, steps, keep, keep_every, damaged):
    "The newest `keep` that are whole, every m-th, and what lies between the newest; no more."
    folder = tmp_path_factory.mktemp("retention")
    for n, step in enumerate(steps):
        path = fake(folder, step, 1000.0 + n)
        if n in damaged:
            (path / "model.safetensors").write_bytes(b"too long")
    checkpoint._retire(folder, keep, keep_every)
    newest, whole = [], 0
    for n, step in reversed(list(enumerate(steps))):
        if keep and whole == keep:
            break
        newest.append(step)
        whole += n not in damaged
    expected = {step for step in steps if step in newest or keep_every and step % keep_every == 0}
    assert set(names(folder)) == {f"step_{step:06d}" for step in expected}


def test_every_mth_stays(base):
    with Saver("base", "t", keep=2, keep_every=30) as saver:
        for step in range(10, 110, 10):
            saver.save(step, tiny_model())
    assert names(saver.folder) == [f"step_{step:06d}" for step in (30, 60, 90, 100)]
    assert find_checkpoint("base", "t").name == "step_000100"


def test_a_clock_that_steps_back(base, monkeypatch):
    "The last one saved is the newest, whatever the clock said, and is not the one to be deleted."
    for tag, now in (("a", 2e9), ("a", 1e9), ("b", 5e8), ("a", 4e8), ("a", 4e8)):
        monkeypatch.setattr(checkpoint.time, "time", lambda now=now: now)
        path = save_checkpoint("base", tag, int(1e5 - now / 1e5), tiny_model(), keep=1)
        assert find_checkpoint("base") == path and find_checkpoint("base", tag) == path
        assert names(path.parent) == [path.name]


def test_what_cannot_be_deleted_does_not_fail_the_save(base, monkeypatch, capsys):
    first = save_checkpoint("base", "t", 1, tiny_model())
    rename = checkpoint.Path.rename

    def refuse(self, target):
        if str(target).endswith(".deleted"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)
    monkeypatch.setattr(checkpoint.Path, "rename", refuse)
    path = save_checkpoint("base", "t", 2, tiny_model(), keep=1)
    assert find_checkpoint("base", "t") == path and first.exists()
    assert "step_000001 could not be deleted" in capsys.readouterr().out


def test_reading_while_a_run_saves_and_deletes(base):
    "Whoever looks for the newest at any moment finds a whole one."
    model, done, seen = tiny_model(), threading.Event(), set()
    save_checkpoint("base", "t", 0, model)

    def run():
        with Saver("base", "t", keep=2) as saver:
            for step in range(1, 40):
                saver.save(step % 7, model)  # some steps again and again
        done.set()
    thread = threading.Thread(target=run)
    thread.start()
    while not done.is_set():
        path = find_checkpoint("base", "t", verify="all")
        seen.add(path.name)
    thread.join()
    assert len(seen) > 1


def test_load_model_checks_the_tokenizer(base):
    tokenizer = Tokenizer.train(["a cat sat on a mat, a cat is a cat"] * 3, 270)
    tokenizer.save()
    other = Tokenizer.train(["other words have other merges, other other"] * 3, 270)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    save_checkpoint("base", "t", 7, model, meta={"tokenizer_fingerprint": tokenizer.fingerprint(),
                                                 "loader": {"row": 3}})
    loaded, found, meta = load_model("base", CPU)
    assert found.fingerprint() == tokenizer.fingerprint() and meta["loader"] == {"row": 3}
    assert meta["step"] == 7 and meta["config"] == model.config.to_dict() and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model("base", CPU, tokenizer=other)
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizer(find_checkpoint("base"), meta, other)
    check_tokenizer(find_checkpoint("base"), {}, other)  # saved without: nothing to compare


def test_compiled_model_saves_under_plain_names():
    model = tiny_model()
    path = save_checkpoint("base", "t", 1, torch.compile(model))
    assert sorted(load_file(path / "model.safetensors")) == sorted(model.state_dict())


def test_rng_state_round_trip():
    def draw():
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
                torch.rand(3).tolist())
    seed_everything(11)
    random.gauss(0, 1)      # leaves half of a pair behind, which is part of the state
    np.random.randn()
    state = json.loads(json.dumps(rng_state()))
    first = draw()
    seed_everything(12)
    set_rng_state(state)
    assert draw() == first


def step_once(model, optimizer, step, rank=0, world_size=1):
    idx = torch.randint(32, (6, 9), generator=torch.Generator().manual_seed(step))[rank::world_size]
    (model(idx[:, :-1], idx[:, 1:], reduction="sum") / 48).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_exact_resume():
    straight = tiny_model()
    optimizer = setup_optimizer(straight)
    for step in range(6):
        if step == 3:
            path = save_checkpoint("base", "t", 3, straight, optimizer)
        step_once(straight, optimizer, step)
    resumed = tiny_model(seed=9)
    load_weights(path, resumed)
    second = setup_optimizer(resumed)
    second.load_state_dict(load_optimizer_state(path, second.state_dict()))
    for step in range(3, 6):
        step_once(resumed, second, step)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    save_checkpoint("base", "bare", 1, straight)
    with pytest.raises(UserError, match="without its optimizer"):
        load_optimizer_state(find_checkpoint("base", "bare"))


# ----------------------------------------------------------------------------- ranks


def double_model(rank=0, world_size=1):
    model = tiny_model().double()
    model.compute_dtype = torch.float64
    return model, setup_optimizer(model, rank=rank, world_size=world_size)


def fails(folder, rank, name, work):
    "Note what a rank was told."
    try:
        work()
    except UserError as error:
        (folder / f"{name}-{rank}").write_text(str(error))


def on_rank(rank, folder):
    "Two ranks save; then one, two and three ranks go on. Starting processes is what takes time."
    torch.set_num_threads(1)
    os.environ.update(NANOCHAT_BASE_DIR=str(folder), RANK=str(rank))
    for world_size, work in ((2, two_ranks), (1, go_on), (2, go_on), (3, go_on)):
        if rank < world_size:
            meet = f"file://{folder}/{work.__name__}{world_size}"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
            work(rank, world_size, folder)
            dist.destroy_process_group()
            gc.collect()


def two_ranks(rank, world_size, folder):
    "Trains 6 steps at 2 ranks, with saves that work and saves that fail in every way."
    model, optimizer = double_model(rank, world_size)
    for step in range(3):
        step_once(model, optimizer, step, rank, world_size)
    seed_everything(rank)
    ranks = {"rank": rank, "world_size": world_size}
    with Saver("base", "good", **ranks) as saver:
        saver.save(3, model, optimizer)
        step_once(model, optimizer, 3, rank, world_size)

    flaky = Saver("base", "flaky", **ranks, timeout=60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    flaky.save(3, model, optimizer)
    flaky.wait()
    if rank == 1:  # a real limit: the kernel refuses to write more of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    flaky.save(4, model, optimizer)
    step_once(model, optimizer, 4, rank, world_size)
    flaky._join()
    if rank == 0:
        (folder / "after").write_text(" ".join(names(flaky.folder)))
    flaky.save(5, model, optimizer)
    fails(folder, rank, "limit", flaky.wait)
    fails(folder, rank, "waiting", lambda: save_checkpoint(
        "base", "flaky", 5, model, optimizer, **ranks))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    flaky.timeout = 0.5
    if rank == 1:  # a thread that dies without a word
        flaky._run = lambda *arguments: None
    flaky.save(6, model, optimizer)
    fails(folder, rank, "silent", flaky.wait)
    if rank == 1:
        del flaky._run
    fails(folder, rank, "json", lambda: save_checkpoint(  # only one rank's notes are no JSON
        "base", "flaky", 7, model, optimizer, {"x": object()} if rank else {}, **ranks))
    flaky.timeout = 60
    flaky.save(8, model, optimizer)
    flaky.wait()
    step_once(model, optimizer, 5, rank, world_size)
    if rank == 0:
        save_file(model.state_dict(), folder / "straight.safetensors")


def go_on(rank, world_size, folder):
    "From the checkpoint that two ranks saved after step 3 to step 6, on this number of ranks."
    path = newest_for_all("base", "good", rank, world_size)
    model, optimizer = double_model(rank, world_size)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    load_weights(path, model)
    optimizer.load_state_dict(load_optimizer_state(path, optimizer.state_dict()))
    state = optimizer.state_dict()
    save_file({key: t.contiguous() for key, t in state.items()},
              folder / f"state-{rank}-of-{world_size}")
    for step in range(3, 6):
        step_once(model, optimizer, step, rank, world_size)
    if rank == 0:
        save_file(model.state_dict(), folder / f"resumed-{world_size}.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes, deadline = mp.spawn(on_rank, args=(folder,), nprocs=3, join=False), 120
    while not processes.join(1):
        if (deadline := deadline - 1) < 0:
            for process in processes.processes:
                process.kill()
            pytest.fail("the ranks hang")
    return folder


def test_two_ranks_save(ranks, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ranks))
    path = find_checkpoint("base", "good", verify="all")
    assert path.name == "step_000003" and names(path) == [
        "meta.json", "model.safetensors", "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors"]
    meta = read_meta(path)
    assert meta["world_size"] == 2 and len(meta["rng"]) == 2 and meta["rng"][0] != meta["rng"][1]
    seed_everything(1)
    assert meta["rng"][1] == rng_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_another_number_of_ranks_goes_on(ranks, world_size, monkeypatch):
    "The optimizer's state is the same to the last bit, the run's end to rounding in fp64."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ranks))
    whole = double_model()[1]
    whole.load_state_dict(load_optimizer_state(find_checkpoint("base", "good")))
    whole, read = whole.state_dict(), set()
    for rank in range(world_size):
        for key, tensor in load_file(ranks / f"state-{rank}-of-{world_size}").items():
            name, kind, *place = key.split("|")
            first = int(place[0].split()[1].split(":")[0]) if place else 0
            expected = whole[f"{name}|{kind}"]
            assert torch.equal(tensor, expected[first:first + len(tensor)] if place else expected)
            read.add(f"{name}|{kind}")
    assert read == set(whole) and any(t.abs().sum() > 0 for t in whole.values())
    resumed = load_file(ranks / f"resumed-{world_size}.safetensors")
    for name, expected in load_file(ranks / "straight.safetensors").items():
        difference = (resumed[name] - expected).norm() / expected.norm().clamp(min=1e-30)
        assert difference <= (0 if world_size == 2 else 1e-12), name


def test_one_rank_reads_only_what_it_owns(ranks, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ranks))
    path, third = find_checkpoint("base", "good"), double_model(1, 3)[1]
    wanted = load_optimizer_state(path, third.state_dict())
    assert 0 < len(wanted) < len(load_optimizer_state(path))
    third.load_state_dict(wanted)


@pytest.mark.parametrize("name, message", [
    ("limit", r"not saved \(rank 1: [^;]* File too large[^;]*\); earlier ones are "),
    ("waiting", r"not saved \(rank 1: [^;]* File too large[^;]*\); earlier ones are "),
    ("silent", r"not saved \(rank 1: nothing written within 0.5 s; do all machines share "),
    ("json", r"not saved \(rank 1: Object of type object is not JSON serializable\)")])
def test_a_rank_that_fails_is_named_on_all(ranks, name, message):
    said = [(ranks / f"{name}-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert re.search(message, said[0]), said[0]


def test_a_rank_that_fails_leaves_the_rest_as_it_was(ranks, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(ranks))
    after = (ranks / "after").read_text()  # of step 4, which failed on rank 1
    assert "step_000003" in after and "step_000004" not in after
    assert names(ranks / "checkpoints/base/flaky") == ["step_000003", "step_000008"]
    assert find_checkpoint("base", "flaky", verify="all").name == "step_000008"
