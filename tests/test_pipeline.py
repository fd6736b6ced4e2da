"""The whole way, tiny but real: every command of the pipeline, two ranks, a kill, and bad input.

Each command runs as a user runs it: a process of its own, `python -m nanochat_nb.…`.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--depth", "1", "--max_seq_len", "128", "--device_batch_size", "4", "--total_batch_size", "1024",
        "--eval_tokens", "4096", "--device_type", "cpu", "--compile", "0"]


def command(base: Path, *args, ranks: int = 0, dtype: str = "float32") -> tuple[list[str], dict]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] \
        if ranks else [sys.executable, "-m"]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": dtype,
           "PYTHONPATH": str(ROOT)}
    module, *flags = map(str, args)
    if ranks:
        flags = ["--", *flags]         # else torchrun takes --run for an abbreviation of its --run-path
    return [*launcher, module, *flags], env


def run(base: Path, module: str, *args, ranks: int = 0, check: bool = True, cwd=None,
        dtype: str = "float32") -> subprocess.CompletedProcess:
    argv, env = command(base, f"nanochat_nb.{module}", *args, ranks=ranks, dtype=dtype)
    done = subprocess.run(argv, env=env, cwd=cwd or base, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, f"{module} {args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    "A base folder with the built-in world and a tokenizer."
    base = tmp_path_factory.mktemp("base")
    run(base, "dataset", "--source", "pocket", "--num_chars", 400_000)
    run(base, "tokenizer", "--vocab_size", 600)
    return base


@pytest.fixture(scope="module")
def pipeline(world) -> Path:
    "All stages after it, ten steps each."
    run(world, "pretraining", *TINY, "--num_iterations", 10, "--save_every", 5)
    run(world, "evaluation", "--source", "base", "--max_per_task", 4, "--split_tokens", 4096)
    small = ["--device_batch_size", 4, "--num_iterations", 5, "--device_type", "cpu"]
    for stage in ("mid", "sft"):
        run(world, "finetuning", "--stage", stage, *small)
        run(world, "chat_eval", "--source", stage, "--max_problems", 4)
    run(world, "reinforcement", "--num_iterations", 2, "--examples_per_step", 2, "--num_samples", 2,
        "--max_new_tokens", 16, "--eval_examples", 4, "--device_type", "cpu")
    run(world, "chat_eval", "--source", "rl", "--max_problems", 4)
    run(world, "report", "--output", "report.md")
    return world


def test_every_stage_leaves_a_checkpoint(pipeline):
    for stage, step in [("base", 10), ("mid", 5), ("sft", 5), ("rl", 2)]:
        folder = pipeline / "checkpoints" / stage / "d1" / f"step_{step:06d}"
        assert {"model.safetensors", "meta.json"} <= {p.name for p in folder.iterdir()}


def test_stages_change_the_weights(pipeline):
    "Each stage starts from the one before and moves: RL may take no step if no reward differs."
    def wte(stage):
        newest = sorted((pipeline / "checkpoints" / stage / "d1").iterdir())[-1]
        return load_file(newest / "model.safetensors")["transformer.wte.weight"]
    base, mid, sft = wte("base"), wte("mid"), wte("sft")
    assert (base != mid).any() and (mid != sft).any()
    assert (base - mid).abs().mean() < base.abs().mean()          # the same model, further on


def test_report_card(pipeline):
    text = (pipeline / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")]
    header = next(row for row in rows if {"BASE", "MID", "SFT", "RL"} <= {c.upper() for c in row})
    names = {row[0]: row for row in rows if len(row) == len(header)}
    for name in ("Pocket-Facts", "Pocket-Reading", "Pocket-Sums", "Pocket-Code", "Pocket-Spelling", "ChatCORE"):
        assert name in names, name
        assert "±" in " ".join(names[name])
    assert any("CORE" in name and name != "ChatCORE" for name in names)
    for words in ("wall time", "torch", "lines", "characters", "files"):
        assert words in text.lower(), words


def test_a_chat_is_answered(pipeline):
    done = run(pipeline, "terminal", "--prompt", "Hello!", "--max_tokens", 12)
    assert "Traceback" not in done.stderr and "<|" not in done.stdout


def test_second_run_reuses(pipeline):
    done = run(pipeline, "pretraining", *TINY, "--num_iterations", 10, "--save_every", 5, "--resume")
    assert "reusing" in done.stdout and "step     1/" not in done.stdout


def test_bits_per_byte_falls(world, tmp_path):
    base = Path(tmp_path)
    for name in ("data", "tokenizer"):
        (base / name).symlink_to(world / name)
    done = run(base, "pretraining", *TINY, "--num_iterations", 60, "--eval_every", 20)
    scores = [float(x) for x in re.findall(r"val_bpb ([\d.]+)", done.stdout)]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True) and scores[-1] < 0.7 * scores[0]


def losses(base: Path, log: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (base / "logs" / f"{log}.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_two_ranks_train_one_model(world):
    "torchrun with two processes gives the losses of one process with the same total batch."
    tiny = [*TINY, "--num_iterations", 12]
    run(world, "pretraining", *tiny, "--model_tag", "one", "--run", "one")
    done = run(world, "pretraining", *tiny, "--model_tag", "two", "--run", "two", ranks=2)
    assert "float32 on 2 × cpu" in done.stdout
    assert done.stdout.count("step     1/12") == 1                # one log, not two
    one, two = losses(world, "one"), losses(world, "two")
    assert one.keys() == two.keys() == set(range(12))
    assert max(abs(one[s] - two[s]) for s in one) < 1e-4
    weights = [load_file(world / "checkpoints" / "base" / tag / "step_000012" / "model.safetensors")
               for tag in ("one", "two")]
    for name, w in weights[0].items():
        assert (w - weights[1][name]).abs().max() < 1e-3 * max(w.abs().max().item(), 1), name


def kill_all(process: subprocess.Popen, tag: str) -> None:
    "SIGKILL the launcher and its ranks, which torchrun puts into sessions of their own."
    pids = {process.pid}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if tag.encode() in path.read_bytes().split(b"\0"):
                pids.add(int(path.parent.name))
        except OSError:        # it ended while we looked
            continue
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    time.sleep(1)              # the ranks are nobody's children now: give the kernel time to end them


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_and_resumed_is_the_same_run(world, ranks):
    "SIGKILL in the middle; the same command with --resume ends with the same bits."
    tiny = [*TINY, "--num_iterations", 40, "--save_every", 4]
    straight, broken = f"straight{ranks}", f"broken{ranks}"
    run(world, "pretraining", *tiny, "--model_tag", straight, "--run", straight, ranks=ranks)
    argv, env = command(world, "nanochat_nb.pretraining", *tiny, "--model_tag", broken, "--run", broken,
                        "--resume", ranks=ranks)
    process = subprocess.Popen(argv, env=env, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.time() + 120
    while not list((world / "checkpoints" / "base").glob(f"{broken}/step_*")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    kill_all(process, broken)
    assert not (world / "checkpoints" / "base" / broken / "step_000040").exists(), "killed too late to tell"
    done = run(world, "pretraining", *tiny, "--model_tag", broken, "--run", broken, "--resume", ranks=ranks)
    assert "resuming after step" in done.stdout
    a, b = (load_file(world / "checkpoints" / "base" / tag / "step_000040" / "model.safetensors")
            for tag in (straight, broken))
    assert all((a[name] == b[name]).all() for name in a)
    assert losses(world, straight)[39] == losses(world, broken)[39]


def test_every_addition_in_half_precision(world):
    "All of the model's options at once, in fp16: resumed to the same bits, finetuned, answering."
    flags = ["pretraining", *TINY, "--depth", 2, "--total_batch_size", 512, "--eval_tokens", 512,  # fp16 is slow here
             "--num_iterations", 8, "--save_every", 4, "--model_tag", "rich",
             "--extras", "all", "--window_pattern", "SL", "--activation_checkpointing", "--chunk_tokens", 100]
    run(world, *flags, dtype="float16")
    last = world / "checkpoints" / "base" / "rich" / "step_000008"
    straight, meta = load_file(last / "model.safetensors"), json.loads((last / "meta.json").read_text())
    assert meta["config"]["smear"] and meta["config"]["window_pattern"] == "SL"
    skipped = math.log2(2.0**16 / meta["loss_scale"]["value"])             # each overflow halves it
    assert skipped in range(4) and 0 < meta["loss_scale"]["good_steps"] <= 8 - skipped
    assert any("value_embed" in name for name in straight) and "x0_lambdas" in straight
    shutil.rmtree(last)
    assert "resuming after step 4" in run(world, *flags, "--resume", dtype="float16").stdout
    resumed = load_file(last / "model.safetensors")
    assert all((straight[name] == resumed[name]).all() for name in straight)
    assert json.loads((last / "meta.json").read_text())["loss_scale"] == meta["loss_scale"]
    run(world, "finetuning", "--stage", "sft", "--source", "base", "--model_tag", "rich", "--num_iterations", 2,
        "--device_batch_size", 4, "--eval_every", -1, "--device_type", "cpu", "--activation_checkpointing", "--chunk_tokens", 100,
        dtype="float16")
    assert run(world, "terminal", "--source", "sft", "--model_tag", "rich", "--prompt", "Hello", dtype="float16").stdout


def test_resume_refuses_another_run(world, pipeline):
    done = run(pipeline, "pretraining", *TINY, "--num_iterations", 10, "--matrix_lr", 0.5, "--resume", check=False)
    assert done.returncode != 0 and "matrix_lr" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- bad input: one line, non-zero, nothing half-written

def no_column(folder: Path) -> None:
    for i in range(2):
        pq.write_table(pa.table({"words": ["a", "b"]}), folder / f"shard_{i:05d}.parquet")


def not_parquet(folder: Path) -> None:
    for i in range(2):
        (folder / f"shard_{i:05d}.parquet").write_bytes(b"this is not parquet")


@pytest.mark.parametrize("fill, words", [
    (lambda folder: None, "shard"), (no_column, "column"), (not_parquet, "shard_0000")])
def test_bad_folder(world, tmp_path, fill, words):
    fill(tmp_path)
    for module in ("tokenizer", "pretraining"):
        done = run(world, module, "--data_dir", tmp_path, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize("args, words", [
    (["pretraining", "--depht", 2], "depht"),
    (["pretraining", *TINY[:-4], "--device_type", "tpu"], "tpu"),
    (["pretraining", "--depth", 0], "n_layer|depth"),
    (["pretraining", *TINY, "--total_batch_size", 1000], "multiple"),
    (["pretraining", *TINY, "--extras", "smear,mud"], "no mud; expected some of value_embeds"),
    (["pretraining", *TINY, "--window_pattern", "SX"], "only L and S"),
    (["pretraining", *TINY, "--fp8"], "fp8"),
    (["finetuning", "--stage", "rlhf"], "mid, sft"),
    (["evaluation", "--source", "base", "--model_tag", "none"], "nanochat_nb.pretraining"),
    (["chat_eval", "--source", "sft", "--model_tag", "none"], "--stage sft"),
    (["terminal", "--source", "rl", "--model_tag", "none", "--prompt", "x"], "nanochat_nb.reinforcement"),
    (["finetuning", "--data_dir", "nowhere"], "nowhere"),
    (["dataset", "--source", "nowhere"], "nowhere"),
])
def test_bad_flags(world, args, words):
    done = run(world, args[0], *args[1:], check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(words, done.stderr.splitlines()[-1]), done.stderr


def test_nothing_there_yet(tmp_path):
    "In an empty base folder every command names the one that must come before it."
    for module, words in [("tokenizer", "nanochat_nb.dataset"), ("pretraining", "nanochat_nb.dataset|nanochat_nb.tokenizer"),
                          ("serving", "speedrun"), ("report", "report")]:
        done = run(tmp_path, module, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert re.search(words, done.stderr), (module, done.stderr)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_unknown_tier():
    done = subprocess.run(["bash", ROOT / "speedrun.sh", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "pocket" in done.stderr and len(done.stderr.splitlines()) == 1
