"""Checkpoints that survive kills, damage, full disks and another number of ranks."""
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import nanochat_nb.checkpoint as checkpoint
from nanochat_nb.checkpoint import (file_sha256, find_checkpoint, find_damage, load_model,
                                    load_optimizer_state, load_weights, read_meta, rng_state,
                                    save_checkpoint, set_rng_state)
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
    (path / "meta.json").write_text(json.dumps(meta))


# ----------------------------------------------------------------------------- kill

SAVER = """
import sys, torch
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.gpt import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(sequence_len=8, vocab_size=2048, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))
class State:
    def state_dict(self):
        return {f"{name}|momentum": p.detach() for name, p in model.named_parameters()}
for step in range(int(sys.argv[1]), 100000):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    print("saving", step, flush=True)
    save_checkpoint("base", "kill", step, model, State(), keep=2)
    print("saved", step, flush=True)
"""


def test_sigkill_in_the_middle_of_saves(base):
    "Killed at random moments, the newest checkpoint found is whole and at least the last reported."
    random.seed(time.time_ns())
    start, interrupted = 1, 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(start)], text=True,
                                   stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline().startswith("saving")
        time.sleep(random.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        lines = [line.split() for line in process.stdout.read().split("\n") if line.count(" ") == 1]
        process.wait()
        reported = max([int(step) for word, step in lines if word == "saved"], default=start - 1)
        interrupted += bool(lines) and lines[-1][0] == "saving" or not lines
        if reported == 0:
            continue  # killed before the first save was done: nothing is promised
        path = find_checkpoint("base", "kill", verify="all")
        step = read_meta(path)["step"]
        assert step >= reported and path.name.startswith(f"step_{step:06d}")
        for file in path.glob("*.safetensors"):
            for tensor in load_file(file).values():
                assert (tensor == step).all(), f"{file.name} mixes steps"
        start = step + 1
    assert interrupted, "no kill fell into a save: the test tested nothing"


@pytest.mark.parametrize("moment", ["model", "optimizer", "manifest", "rename", "retire"])
def test_killed_at_each_stage(base, monkeypatch, moment):
    "The same at every chosen point of a save, also where a step is saved a second time."
    model = tiny_model()
    optimizer = setup_optimizer(model)
    save_checkpoint("base", "t", 1, model, optimizer)
    save_checkpoint("base", "t", 2, model, optimizer)

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    if moment in ("model", "optimizer"):
        original = checkpoint._write_part

        def write(folder, name, tensors):
            if name.startswith(moment):
                (folder / name).write_bytes(b"half")
                kill()
            original(folder, name, tensors)
        monkeypatch.setattr(checkpoint, "_write_part", write)
    elif moment == "manifest":
        monkeypatch.setattr(checkpoint, "atomic_write", kill)
    elif moment == "rename":  # the old step 2 was moved away, the new one is not yet there
        original_rename = checkpoint.Path.rename

        def rename(self, target):
            return kill() if self.name.endswith(".tmp") else original_rename(self, target)
        monkeypatch.setattr(checkpoint.Path, "rename", rename)
    else:
        monkeypatch.setattr(checkpoint, "_retire", kill)
    with pytest.raises(Killed):
        save_checkpoint("base", "t", 2, tiny_model(seed=1), optimizer)
    monkeypatch.undo()
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    path = find_checkpoint("base", "t", verify="all")
    assert read_meta(path)["step"] == 2
    loaded = tiny_model(seed=5)
    load_weights(path, loaded)
    expected = tiny_model(seed=1) if moment == "retire" else model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters()))
    third = save_checkpoint("base", "t", 3, model, optimizer, keep=1)  # goes on, and cleans up
    assert [p.name for p in third.parent.iterdir()] == ["step_000003"]


def test_disk_full_keeps_the_old_checkpoint(base, monkeypatch):
    model = tiny_model()
    first = save_checkpoint("base", "t", 1, model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left.*untouched"):
        save_checkpoint("base", "t", 2, model)
    assert find_checkpoint("base", verify="all") == first
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # no half file is left


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
    if (damage, name) == (damage_flip, "meta.json"):
        return  # in JSON a flipped bit is a syntax error, as truncation is, or another value
    damage(second / name)
    assert find_damage(second, "all")
    assert find_checkpoint("base", "t", verify="all") == first
    assert "base/" not in first.name and "step_000002" in capsys.readouterr().out
    if damage is not damage_flip:
        assert find_checkpoint("base", "t") == first
    with pytest.raises(UserError, match="no whole checkpoint.*step_000002"):
        find_checkpoint("base", "t", step=2, verify="all")


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
    with pytest.raises(UserError, match="is a pickle"):
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
    elif kind == "extra":
        tensors["surprise"] = torch.zeros(2)
    else:
        tensors[name][1, 2] = float(kind)
    return tensors


@pytest.mark.parametrize("kind, message", [("shape", "has shape"), ("missing", "lacks lm_head"),
                                           ("extra", "has surprise"), ("nan", "not finite"),
                                           ("inf", "not finite")])
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


def test_weights_that_are_not_finite_are_not_saved(base):
    model = tiny_model()
    first = save_checkpoint("base", "t", 1, model)
    model.lm_head.weight.data[0, 0] = float("inf")
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
    save_checkpoint("base", "v", 7, tiny_model(vocab_size=64))
    with pytest.raises(UserError, match="vocabulary of 64"):
        load_model("base", CPU, tag="v")


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


def save_on_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    os.environ.update(NANOCHAT_BASE_DIR=str(folder), RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank,
                            world_size=world_size)
    model = tiny_model()
    optimizer = setup_optimizer(model, rank=rank, world_size=world_size)
    for step in range(3):
        step_once(model, optimizer, step, rank, world_size)
    seed_everything(rank)
    save_checkpoint("base", "ranks", 3, model, optimizer, rank=rank, world_size=world_size)
    if rank == 1:  # one rank's disk is full: all ranks hear of it, none waits for ever
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")
        checkpoint.save_file = full
    try:
        save_checkpoint("base", "ranks", 4, model, optimizer, rank=rank, world_size=world_size)
    except UserError as error:
        (folder / f"error-{rank}").write_text(str(error))
    for step in range(3, 6):
        step_once(model, optimizer, step, rank, world_size)
    if rank == 0:
        save_file(model.state_dict(), folder / "straight.safetensors")
    dist.destroy_process_group()
    gc.collect()


def test_saved_by_two_ranks_loaded_by_one(base):
    mp.spawn(save_on_rank, args=(2, base), nprocs=2)
    path = find_checkpoint("base", verify="all")
    assert path.name == "step_000003"
    assert all("rank 1" in (base / f"error-{rank}").read_text() for rank in (0, 1))
    assert sorted(p.name for p in path.iterdir()) == [
        "meta.json", "model.safetensors", "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors"]
    meta = read_meta(path)
    assert meta["world_size"] == 2 and len(meta["rng"]) == 2 and meta["rng"][0] != meta["rng"][1]
    model = tiny_model(seed=4)
    load_weights(path, model)
    optimizer = setup_optimizer(model)
    optimizer.load_state_dict(load_optimizer_state(path))
    # each of three ranks reads only what belongs to its parameters, and together they have it all
    for rank in range(3):
        third = setup_optimizer(model, rank=rank, world_size=3)
        wanted = load_optimizer_state(path, third.state_dict())
        assert len(wanted) < len(load_optimizer_state(path))
        third.load_state_dict(wanted)
        for key, tensor in third.state_dict().items():
            name, kind, *place = key.split("|")
            whole = optimizer.state_dict()[f"{name}|{kind}"]
            first = int(place[0].split()[1].split(":")[0]) if place else 0
            assert torch.equal(tensor, whole[first:first + len(tensor)] if place else whole)
    for step in range(3, 6):
        step_once(model, optimizer, step)
    for name, expected in load_file(base / "straight.safetensors").items():
        assert (model.state_dict()[name] - expected).norm() <= 1e-5 * expected.norm()  # fp32
