"""The memory estimator against what training takes: the allocator's record, and whole processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_nb import optimizer
from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.memory import (STACK, block_keeps, memory_phases, memory_timeline,
                                parameter_shapes, peak_bytes, state_bytes, training_memory)
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import train_step
from nanochat_nb.scaling import FILL, config_for_depth, fit_memory, memory_on_gpu, plan

ALL_ADDITIONS = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True,
                 "qk_scale": 1.2}


def held(model, optimizer) -> int:
    "Bytes of weights, tables of angles and optimizer state."
    state = [t for bundle in optimizer.bundles for t in bundle.state.values()]
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *state])


def measured(config, batch_size, dtype=torch.float32, grad_accum=True, chunk_tokens=0,
             recompute=False, rank=0, world_size=1) -> int:
    "Peak bytes of one real training step on this CPU, with all that is held throughout."
    model = GPT(config).init_weights(0)
    model.compute_dtype, model.chunk_tokens, model.recompute = dtype, chunk_tokens, recompute
    opt = setup_optimizer(model, rank=rank, world_size=world_size)
    before = held(model, opt)

    def step():
        idx = torch.randint(config.vocab_size, (1 + grad_accum, batch_size, config.sequence_len))
        train_step(model, opt, [(row, row) for row in idx])

    return before + peak_bytes(step)


def small(**changes) -> GPTConfig:
    return GPTConfig(**{"sequence_len": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2,
                        "n_kv_head": 2, "n_embd": 64, **changes})


SHAPES = {
    "wide vocabulary": (small(vocab_size=4096), 4),
    "deep": (small(n_layer=4), 8),
    "little batch": (small(n_embd=128, vocab_size=2048), 1),
    "shared keys": (small(n_head=4, n_kv_head=1), 8),
    "all additions": (small(**ALL_ADDITIONS, n_layer=3), 8),
    "additions, little batch": (small(**ALL_ADDITIONS, vocab_size=4096), 1),
    "windows": (small(sequence_len=512, window_pattern="SL"), 2),
    "no cap": (small(logit_softcap=0.0, vocab_size=2048), 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_estimate_is_within_three_hundredths(shape, dtype):
    "Every switch on and off, with and without gradients of an earlier micro-batch."
    config, batch_size = SHAPES[shape]
    for chunk_tokens, recompute, grad_accum in ((0, False, True), (64, False, False),
                                                (0, True, False), (64, True, True)):
        switches = {"chunk_tokens": chunk_tokens, "recompute": recompute, "grad_accum": grad_accum}
        estimate = training_memory(config, batch_size, dtype=dtype, device_type="cpu", **switches)
        ratio = estimate["total"] / measured(config, batch_size, dtype, **switches)
        assert 0.97 < ratio < 1.03, (switches, ratio)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_estimate_of_any_shape(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    heads, additions = draw(2, 4), {name: draw(False, True) for name in list(ALL_ADDITIONS)[:4]}
    config = small(n_embd=32 * heads, n_head=heads, n_kv_head=draw(1, heads), n_layer=draw(2, 3),
                   vocab_size=draw(500, 1000, 4096), sequence_len=draw(32, 64),
                   logit_softcap=draw(0.0, 15.0), **additions)
    batch_size, dtype = draw(1, 3, 8), draw(torch.float32, torch.bfloat16)
    switches = {"chunk_tokens": draw(0, 50, 128), "recompute": draw(False, True),
                "grad_accum": draw(False, True)}
    estimate = training_memory(config, batch_size, dtype=dtype, device_type="cpu", **switches)
    ratio = estimate["total"] / measured(config, batch_size, dtype, **switches)
    assert 0.97 < ratio < 1.03, ratio


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("config", [small(), small(n_layer=5, n_kv_head=1, **ALL_ADDITIONS)],
                         ids=["plain", "all additions"])
def test_state_of_the_fullest_rank(config, world_size):
    "All of it but the counters of steps; where rows do not divide, a row may be counted too much."
    def state(rank):
        opt = setup_optimizer(GPT(config), rank=rank, world_size=world_size)
        return sum(tensor.nbytes for bundle in opt.bundles for key, tensor in bundle.state.items()
                   if key != "step")

    fullest = max(state(rank) for rank in range(world_size))
    assert fullest <= state_bytes(config, world_size) <= 1.002 * fullest


def on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank,
                            world_size=world_size)
    rows = [measured(*RANKED[name], rank=rank, world_size=world_size) for name in RANKED]
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


RANKED = {"the update is the worst": (small(n_layer=3, vocab_size=2048), 1),
          "the loss is": (small(n_layer=3), 8)}


def test_estimate_for_two_ranks(tmp_path):
    "Two processes; what gloo holds outside the allocator is not seen."
    mp.spawn(on_rank, args=(2, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for (config, batch_size), *sizes in zip(RANKED.values(), *ranks):
        estimate = training_memory(config, batch_size, 2, torch.float32, device_type="cpu")
        assert 0.9 < estimate["total"] / max(sizes) < 1.1


def test_stacks_and_muons_matrices_are_the_optimizers():
    assert STACK == optimizer.MAX_STACK
    config = small(**ALL_ADDITIONS)
    model = GPT(config)
    matrices = {id(p) for bundle in setup_optimizer(model).bundles
                if bundle.group["kind"] == "muon" for p in bundle.params}
    assert ({name for name, _, muon in parameter_shapes(config) if muon}
            == {name for name, p in model.named_parameters() if id(p) in matrices})


def test_the_timeline_counts_copies_results_and_what_is_given_back():
    a = torch.randn(250, 1000)

    def step():
        b = a * 2                                         # 1 MB
        with torch.profiler.record_function("second"):
            c = b.t().contiguous()                        # 1 MB more
        del b
        c.sort()                                          # values, and 2 MB of int64 places

    ms, live, ranges = memory_timeline(step)
    assert len(ms) == len(live) and ms == sorted(ms) and list(ranges) == ["second"]
    assert live[-1] == 0 and max(live) >= 4_000_000
    assert peak_bytes(lambda: None) == 0
    for asked in (lambda: peak_bytes(step, "mps"),
                  lambda: training_memory(small(), 1, device_type="mps")):
        with pytest.raises(UserError, match="cpu or cuda"):
            asked()


def test_the_peak_is_a_maximum_and_parts_add_up():
    config = config_for_depth(20)
    for switches in ({}, {"chunk_tokens": 2048}, {"chunk_tokens": 2048, "recompute": True}):
        phases = memory_phases(config, 8, **switches)
        total = training_memory(config, 8, **switches)
        assert total.pop("total") == sum(total.values()) == max(sum(parts.values())
                                                                for parts in phases.values())
    assert block_keeps(config, 0)["ReLU"] == 2 * 4 * config.n_embd


def test_a_plan_names_the_flags_with_which_it_fits():
    alone = plan(20, "RTX4090", extras="none")
    assert alone.memory["total"] <= FILL * 24e9 and not alone.recompute
    tight = plan(20, "RTX4090", device_batch_size=32, extras="none")
    assert tight.memory["total"] <= FILL * 24e9
    assert "--device_batch_size 32 --activation_checkpointing" in str(tight)
    assert "--activation_checkpointing" not in str(plan(12, "8xH100"))
    assert "DOES NOT FIT" in str(plan(40, "L4"))
    config = config_for_depth(26)                       # a larger batch would not have fitted
    size, recompute = fit_memory(config, 1, FILL * 24e9)
    assert memory_on_gpu(config, size, 1, recompute)["total"] <= FILL * 24e9
    assert size == 32 or memory_on_gpu(config, 2 * size, 1, recompute)["total"] > FILL * 24e9


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux counts the peak")
def test_a_whole_process_grows_by_what_was_estimated():
    "Peak resident memory of a fresh process over its memory before the model is built."
    result = subprocess.run([sys.executable, str(ROOT / "bench/memory.py"), "--process", json.dumps(
        {"depth": 4, "vocab_size": 16384, "sequence_len": 256, "batch_size": 4,
         "chunk_tokens": 0, "recompute": True})], text=True, capture_output=True, timeout=300,
        # every tensor its own mapping: the C library would keep memory that was given back
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["measured"] > 3e8 and 0.9 < row["ratio"] < 1.1, row
