"""What a run will cost: counts against published runs, and fits against laws that were put in."""
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_module
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import Compute, UserError, write_report_section
from nanochat_nb.memory import training_memory
from nanochat_nb.report import estimate_table, make_report
from nanochat_nb.scaling import (DEVICES, chars_per_token, config_for_depth, count_parameters,
                                 estimate_run, fit_isoflop, flops_per_token, isoflop_optima,
                                 known_device, parse_hardware, peak_flops, plan, power_law,
                                 scaling_exponents, text_in_folder)

CPU = Compute(torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------- counts and plans

@pytest.mark.parametrize("depth, parameters, tokens, steps", [
    (4, 36.7e6, 0.734e9, 1_400), (12, 185.6e6, 3.71e9, 7_080), (20, 561e6, 11.2e9, 21_400),
    (26, 1.08e9, 21.6e9, 41_275), (32, 1_879_048_192, 37.6e9, 71_680)])
def test_published_runs(depth, parameters, tokens, steps):
    "The 2025-11 reference's table: 20 tokens per parameter, batches of 2¹⁹ tokens."
    made = plan(depth, "8xH100", target_param_data_ratio=20, total_batch_size=2**19,
                extras="none")
    assert count_parameters(made.config)["total"] == pytest.approx(parameters, rel=5e-3)
    assert made.tokens == pytest.approx(tokens, rel=5e-3)
    assert made.steps == steps


@pytest.mark.parametrize("depth, total, matrices, scaling", [
    (12, 286.3e6, 84.9e6, 110.1e6), (20, 896.5e6, 393.2e6, 435.2e6), (24, 1384e6, 679.5e6, 729.8e6),
    (32, 2819e6, 1611e6, 1678e6)])
def test_published_counts_of_2026(depth, total, matrices, scaling):
    "The 2026 reference has value embeddings and half the vocabulary."
    count = count_parameters(config_for_depth(depth, 32768, value_embeds=True))
    assert count["total"] == pytest.approx(total, rel=1e-3)
    assert count["blocks"] == pytest.approx(matrices, rel=1e-3)
    assert count["blocks"] + count["lm_head"] == pytest.approx(scaling, rel=1e-3)


@given(st.integers(1, 40), st.integers(256, 100_000), st.sampled_from([64, 256, 2048]))
@settings(max_examples=25, deadline=None)
def test_pencil(depth, V, T):
    C, config = 64 * depth, config_for_depth(depth, V, T)
    assert count_parameters(config)["total"] == 2 * V * C + 12 * C * C * depth
    assert flops_per_token(config) == 6 * (V * C + 12 * C * C * depth) + 12 * C * T * depth


def test_hours_of_a_published_run():
    "Depth 32: 71,680 steps of 1.572 s at 50.9 % of eight H100; $24 an hour."
    made = plan(32, "8xH100", target_param_data_ratio=20, total_batch_size=2**19, mfu=0.509,
                extras="none")
    assert made.hours == pytest.approx(71_680 * 1.572 / 3600, rel=5e-3)
    assert made.dollars == pytest.approx(24 * made.hours)
    assert made.flops == pytest.approx(4.54e20, rel=1e-3)


@given(st.integers(2, 24), st.sampled_from(["H100", "8xH100", "4xA100", "RTX4090"]),
       st.floats(0.1, 0.9))
@settings(max_examples=25, deadline=None)
def test_a_plan_agrees_with_itself(depth, hardware, mfu):
    made = plan(depth, hardware, mfu=mfu)
    count, name = parse_hardware(hardware)
    assert made.tokens == made.steps * made.batch
    assert made.flops == made.tokens * flops_per_token(made.config)
    assert made.hours * 3600 * count * DEVICES[name].peak * mfu == pytest.approx(made.flops)
    assert made.grad_accum_steps * made.device_batch_size * 2048 * count == made.batch
    assert made.dollars == pytest.approx(made.hours * count * DEVICES[name].dollars)


def test_what_is_given_is_kept():
    made = plan(4, "cpu", vocab_size=4096, max_seq_len=256, total_batch_size=8192,
                device_batch_size=16, num_iterations=260, dollars_per_hour=0.5)
    assert (made.batch, made.device_batch_size, made.grad_accum_steps) == (8192, 16, 2)
    assert made.steps == 260 and made.tokens == 260 * 8192
    assert made.dollars == pytest.approx(made.hours / 2)
    assert str(made).count("as given") == 2          # batch and steps do not follow the rule
    assert made.memory["total"] < made.device_memory


@pytest.mark.parametrize("flags", [{"hardware": "8xTPU"}, {"hardware": "0xH100"}, {"hardware": ""},
                                   {"mfu": 0}, {"mfu": 1.2}, {"depth": 0},
                                   {"target_param_data_ratio": 0}])
def test_nonsense_is_refused(flags):
    with pytest.raises(UserError):
        plan(**flags)


def test_command_line():
    done = run_module("scaling", "--depth", 20, "--hardware", "8xH100",
                      "--target_param_data_ratio", 20, "--total_batch_size", 2**19,
                      "--extras", "none")
    assert done.returncode == 0, done.stderr
    for part in ("560,988,160", "11,219,763,200", "21,400", "217 shards", "3.1 hours",
                 "$73.36", "45%"):
        assert part in done.stdout, part
    wrong = run_module("scaling", "--hardware", "8xTPU")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "H100" in wrong.stderr


# ---------------------------------------------------------------- text

def shards(folder, documents_by_shard):
    folder.mkdir(parents=True, exist_ok=True)
    for k, texts in enumerate(documents_by_shard):
        table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"shard_{k:05d}.parquet", row_group_size=100,
                       compression="zstd")
    return str(folder)


def some_texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh é\n", k=rng.randint(50, 900))) for _ in range(n)]


def test_text_in_a_folder(tmp_path):
    "Bytes of the training shards, whatever other columns there are; the last shard is validation."
    texts = some_texts(700)
    folder = shards(tmp_path, [texts[:300], texts[300:600], texts[600:]])
    num_bytes = sum(len(text.encode()) for text in texts[:600])
    assert text_in_folder(folder) == pytest.approx(num_bytes, rel=0.03)
    assert text_in_folder(shards(tmp_path / "none", [[], []])) < 100
    short = [f"{n:020d}" for n in range(4000)]       # here the four bytes of each length would show
    folder = shards(tmp_path / "short", [short, ["x"]])
    assert text_in_folder(folder) == pytest.approx(80_000, rel=0.12)


def test_real_text_in_a_folder(real_data):
    from nanochat_nb.dataset import Documents
    folder = real_data / "text"
    assert text_in_folder(folder) == pytest.approx(
        sum(len(text) for text in Documents(folder, "train")), rel=0.01)


def test_too_few_data_are_told(tmp_path):
    folder = shards(tmp_path, [some_texts(2000), some_texts(10, 1)])
    held = text_in_folder(folder) / chars_per_token(512)
    def made(epochs):
        return plan(1, "H100", vocab_size=512, max_seq_len=64, total_batch_size=64, data_dir=folder,
                    num_iterations=round(epochs * held / 64))
    few, enough = made(4.1), made(3.9)
    assert (few.epochs, enough.epochs) == pytest.approx((4.1, 3.9), rel=0.01)
    assert enough.warnings() == [] and "WARNING" not in str(enough)
    assert "2305.16264" in few.warnings()[0] and "4.1 times" in str(few)
    with pytest.raises(UserError, match="no data folder"):
        plan(1, "H100", data_dir=str(tmp_path / "nowhere"))


@given(st.integers(256, 200_000), st.integers(256, 200_000))
def test_larger_vocabularies_have_longer_tokens(a, b):
    low, high = sorted((a, b))
    assert 1 < chars_per_token(low) <= chars_per_token(high) < 6


# ---------------------------------------------------------------- devices and estimates

@pytest.mark.parametrize("name, key", [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA L40", None),
    ("NVIDIA A10", None), ("NVIDIA GeForce RTX 5090", None)])
def test_known_devices(monkeypatch, name, key):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = Compute(torch.device("cuda:0"), torch.bfloat16)
    assert known_device(gpu) is (DEVICES[key] if key else None)
    if key:
        assert peak_flops(gpu) == DEVICES[key].peak
    assert known_device(CPU) is None


def test_estimate_of_a_run(monkeypatch):
    "The estimate that pretraining stores is that of the plan."
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    made = plan(12, "8xH100")
    eight = Compute(torch.device("cuda:0"), torch.bfloat16, 0, 8)
    found = estimate_run(made.config, made.tokens, eight, made.device_batch_size,
                         chunk_tokens=2**27 // 65536)
    assert found["tokens"] == made.tokens and found["flops"] == made.flops
    assert found["seconds"] == pytest.approx(made.hours * 3600)
    assert found["dollars"] == pytest.approx(made.dollars)
    assert found["peak_memory_gb"] == pytest.approx(made.memory["total"] / 1e9)


def test_estimate_on_a_cpu():
    config = config_for_depth(2, 512, 64)
    found = estimate_run(config, 10_000, CPU, 4, grad_accum=False, peak=1e9, held_gb=0.5)
    assert "dollars" not in found
    assert found["seconds"] == pytest.approx(flops_per_token(config) * 10_000 / 0.45e9)
    needed = training_memory(config, 4, 1, torch.float32, grad_accum=False, device_type="cpu")
    assert found["peak_memory_gb"] == pytest.approx(0.5 + needed["total"] / 1e9)
    twice = estimate_run(config, 10_000, Compute(CPU.device, CPU.dtype, 0, 2), 4, peak=1e9)
    assert twice["seconds"] == pytest.approx(found["seconds"] / 2)


def test_estimates_in_the_report(base_dir, tmp_path):
    estimates = {"tokens": 1000, "flops": 2e12, "seconds": 100.0, "dollars": 3.0,
                 "peak_memory_gb": 2.0}
    write_report_section("base-training", 3, {}, {
        "tokens": 1000, "flops": 2e12, "seconds": 150.0, "peak_memory_gb": 1.0,
        "estimates": estimates})
    page = make_report(str(tmp_path / "r.md")).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()
            if line.startswith("|")]
    for row in (["tokens", "1,000", "1,000", "1.00"], ["peak memory", "2.00 GB", "1.00 GB", "0.50"],
                ["time", "1 min 40 s", "2 min 30 s", "1.50"], ["cost", "$3.00", "$4.50", "1.50"]):
        assert row in rows
    assert "estimates" not in page


@pytest.mark.parametrize("results", [
    {}, {"estimates": None}, {"estimates": [1]}, {"estimates": {"seconds": "<b>"}},
    {"estimates": {"seconds": 0}}, {"estimates": {"flops": math.nan, "dollars": True}}])
def test_estimates_that_are_none(results):
    assert estimate_table({"seconds": 3.0, **results}) == []


def test_estimate_without_an_actual():
    rows = estimate_table({"estimates": {"tokens": 5, "dollars": 1.0, "seconds": 9.0}})[2:5]
    assert [row.split("|")[3:5] for row in rows] == [[" — "] * 2] * 3


# ---------------------------------------------------------------- the laboratory's fits

@given(st.floats(4, 20), st.floats(0.01, 3), st.floats(0.1, 9),
       st.lists(st.integers(-15, 15), min_size=3, max_size=7, unique=True))
@settings(deadline=None)
def test_parabola(log_best, bend, lowest, places):
    "The bottom is found wherever the sizes lie around it."
    places = np.array(places) / 5
    size, loss = fit_isoflop(np.exp(log_best + places), lowest + bend * places**2)
    assert math.log(size) == pytest.approx(log_best, abs=1e-3)
    assert loss == pytest.approx(lowest, abs=1e-3)


def test_no_bottom():
    for losses in ([3, 2, 1], [1, 2, 1], [1, 1, 1]):
        with pytest.raises(UserError, match="smaller and larger"):
            fit_isoflop([1, 10, 100], losses)
    with pytest.raises(UserError, match="three sizes"):
        fit_isoflop([1, 10, 10], [3, 2, 3])


@given(st.floats(-2, 2), st.floats(1e-3, 1e3),
       st.lists(st.integers(-6, 20), min_size=2, max_size=6, unique=True))
@settings(deadline=None)
def test_power_law(exponent, factor, powers):
    x = 10.0 ** np.array(powers)
    found = power_law(x, factor * x**exponent)
    assert found == pytest.approx((exponent, factor), rel=1e-3, abs=1e-3)


def runs_of(exponent, seeds=1, noise=0.0, seed=0):
    "Made-up runs whose best size is 5 · C^exponent, C = 6 N D."
    rng, runs = np.random.default_rng(seed), []
    for C in (1e9, 1e10, 1e11, 1e12):
        best = 5 * C**exponent
        for factor in (0.25, 0.5, 1, 2, 4):
            runs += [{"budget": C, "n": factor * best, "tokens": C / (6 * factor * best),
                      "loss": 3 + 0.1 * math.log(factor) ** 2 + noise * rng.standard_normal()}
                     for _ in range(seeds)]
    return runs


@given(st.floats(0.2, 0.8))
@settings(max_examples=25, deadline=None)
def test_exponents_are_found(exponent):
    found = scaling_exponents(runs_of(exponent), "n")
    assert found["size"][0] == pytest.approx(exponent, abs=1e-6)
    assert found["tokens"][0] == pytest.approx(1 - exponent, abs=1e-6)
    assert math.isnan(found["size"][1])                    # one run a size says nothing of chance
    for best in isoflop_optima(runs_of(exponent), "n"):
        assert best["loss"] == pytest.approx(3)
        assert best["size"] == pytest.approx(5 * best["budget"]**exponent)


def test_bootstrap_error_is_of_the_right_size():
    "It is nothing without noise, and near the scatter of repeated studies with noise."
    assert scaling_exponents(runs_of(0.5, seeds=3), "n")["size"][1] == pytest.approx(0, abs=1e-9)
    studies = [scaling_exponents(runs_of(0.5, 5, 0.01, seed), "n", resamples=100)
               for seed in range(20)]
    scatter = np.std([study["size"][0] for study in studies], ddof=1)
    errors = np.mean([study["size"][1] for study in studies])
    assert 0.5 < errors / scatter < 2
    again = scaling_exponents(runs_of(0.5, 5, 0.01, 19), "n", resamples=100)
    assert again == studies[-1]                            # its chance is seeded
