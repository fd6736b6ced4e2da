"""Bits per byte by another way, the recipe behind the dial, when compiling pays, a picture of a run."""
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import Compute, UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import lr_schedule
from nanochat_nb.pretraining import (Progress, evaluate_bpb, loss_figure, muon_momentum,
                                     should_compile)
from nanochat_nb.scaling import (FORGETTING, MIN_BATCH, REFERENCE_BATCH, additions, batch_for_steps,
                                 batch_tokens, config_for_depth, learning_rates, recipe,
                                 training_tokens)
from nanochat_nb.tokenizer import Tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
TEXT = ["The miller carried seven plums to the river.", "Übermorgen: naïve café — 3 €!",
        "A heron forgot the brass bell. " * 4]


# ---------------------------------------------------------------- bits per byte


def test_bits_per_byte_in_numpy():
    "Token by token in fp64 from the logits, bytes by decoding whole documents: not by our table."
    tokenizer = Tokenizer.train(TEXT * 3, vocab_size=300)
    model = GPT(GPTConfig(sequence_len=200, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_kv_head=1, n_embd=32)).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    batches, nats, num_bytes = [], 0.0, 0
    for text in TEXT:
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text), tokenizer.bos]])
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        logits = model(inputs).detach()[0].double().numpy()
        log_p = logits - logits.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        nats -= sum(log_p[i, t] for i, t in enumerate(targets[0].tolist()[:-1]))  # not the last bos
        num_bytes += len(text.encode())
        batches.append((inputs, targets))
    ours = evaluate_bpb(model, batches, tokenizer.token_bytes())
    assert ours == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    model.chunk_tokens = 7                                        # the loss in parts, likewise
    assert evaluate_bpb(model, batches, tokenizer.token_bytes()) == pytest.approx(ours, rel=1e-6)
    hidden = [(inputs, targets.masked_fill(torch.arange(targets.size(1)) % 2 == 0, -1))
              for inputs, targets in batches]
    assert evaluate_bpb(model, hidden, tokenizer.token_bytes()) != pytest.approx(ours, rel=1e-3)
    with pytest.raises(UserError, match="no text to evaluate on"):
        evaluate_bpb(model, [], tokenizer.token_bytes())


# ---------------------------------------------------------------- the recipe


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 32), st.sampled_from([1024, 4096, 65536]), st.sampled_from([256, 500, 2048]),
       st.sampled_from([1, 2, 3, 8]), st.floats(0.01, 40), st.floats(0.3, 1.0))
def test_a_recipe_holds_from_depth_2_to_32(depth, V, T, ranks, ratio, mean):
    config = config_for_depth(depth, V, T, **additions())
    made = recipe(config, ratio, ranks, schedule_mean=mean)
    asked = training_tokens(config, ratio)
    assert made.batch == made.device_batch_size * made.grad_accum_steps * T * ranks
    assert made.tokens == made.batch * made.steps
    assert made.batch <= 1.5 * REFERENCE_BATCH
    assert made.tokens <= asked or made.steps == 1
    if made.steps > 1 and (T * ranks) & (T * ranks - 1) == 0:         # powers of two divide evenly
        assert made.batch == max(batch_tokens(asked), T * ranks)
        assert made.steps >= 500 or made.batch == max(MIN_BATCH, T * ranks)
    rates = made.rates
    assert 0.02 <= rates["matrix_lr"] <= 0.04 and 0.004 <= rates["unembedding_lr"] <= 0.008
    assert 0 < rates["weight_decay"] <= 1
    decays = rates["matrix_lr"] * rates["weight_decay"] * made.steps * mean
    assert decays == pytest.approx(FORGETTING) or rates["weight_decay"] == 1


def test_weight_decay_of_a_whole_run():
    "What nothing pushes has shrunk by e² when the schedule of pretraining is over."
    made = recipe(config_for_depth(4, 4096, 512), num_iterations=700)
    size = 1.0
    for step in range(700):
        lr = made.rates["matrix_lr"] * lr_schedule(step, 700, warmdown_ratio=0.65)
        size *= 1 - lr * made.rates["weight_decay"]
    assert -math.log(size) == pytest.approx(2, rel=0.01)


def test_what_is_given_replaces_the_rule_and_is_followed():
    config = config_for_depth(4, 4096, 512)
    made = recipe(config, num_iterations=600, unembedding_lr=0.001, weight_decay=0.0)
    assert made.steps == 600 and made.batch == batch_for_steps(600)
    assert made.rates == learning_rates(made.batch) | {"unembedding_lr": 0.001, "weight_decay": 0.0}
    text = {label: rule for label, _, rule in made.rows()}
    assert text["steps"] == text["weight decay"] == "as given"
    assert text["learning rates"].endswith("as given: unembedding_lr")
    longer = recipe(config, num_iterations=100_000)
    assert longer.batch > made.batch and longer.rates["matrix_lr"] < made.rates["matrix_lr"]
    assert recipe(config, total_batch_size=4096, device_batch_size=2).grad_accum_steps == 4
    for flags in ({"num_iterations": 0}, {"ratio": 0}, {"total_batch_size": 1000},
                  {"total_batch_size": 4096, "device_batch_size": 3}):
        with pytest.raises(UserError):
            recipe(config, **flags)


@given(st.integers(1, 30_000))
def test_batch_for_steps_agrees_with_the_rule(steps):
    batch = batch_for_steps(steps)
    assert batch == batch_tokens(steps * batch)
    smaller = [2**k for k in range(20) if MIN_BATCH <= 2**k < batch]
    assert all(batch_tokens(steps * size) > size for size in smaller)


def test_additions():
    assert additions("none") == additions("") == {}
    assert additions("smear , backout") == {"smear": True, "backout": True}
    assert set(additions()) < set(additions("all"))
    for bad in ("mud", "smear,,backout", "all,smear"):
        with pytest.raises(UserError, match="expected some of"):
            additions(bad)


# ---------------------------------------------------------------- schedules, compiling, pictures


@given(st.integers(1, 50_000))
def test_momentum_remembers_a_share_of_the_run(steps):
    values = [muon_momentum(step, steps) for step in (0, steps // 4, steps)]
    assert 0.8 <= values[0] <= values[1] <= values[2] <= 0.95
    memory = 1 / (1 - values[2])
    assert memory == pytest.approx(min(max(steps / 60, 5), 20))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiling_pays_from_a_certain_length_on(monkeypatch):
    config = config_for_depth(4, 4096, 512)
    answers = [should_compile(-1, CPU, config, tokens) for tokens in (10**3, 10**5, 10**9)]
    assert answers[0] is False and answers[2] is True and answers == sorted(answers)
    assert should_compile(0, CPU, config, 10**9) is False
    assert should_compile(1, CPU, config, 1) is True
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert should_compile(-1, CPU, config, 10**9) is False


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiling_pays_earlier_in_bf16(monkeypatch):
    monkeypatch.setattr("nanochat_nb.pretraining.peak_flops", lambda compute: 2e11)
    config, first = config_for_depth(4, 4096, 512), {}
    for dtype in (torch.bfloat16, torch.float32):
        compute = Compute(torch.device("cpu"), dtype)
        first[dtype] = next(n for n in range(40) if should_compile(-1, compute, config, 2**n))
    # 60 s of compiling; of a second's 6,349 tokens at the peak, eager and compiled take the measured shares
    assert 2 ** first[torch.bfloat16] / 2 < 60 * 6349 / (1 / 0.43 - 1 / 0.60) <= 2 ** first[torch.bfloat16]
    assert 2 ** first[torch.float32] / 2 < 60 * 6349 / (1 / 0.57 - 1 / 0.64) <= 2 ** first[torch.float32]


def test_progress_goes_on_where_it_was():
    whole, half = (Progress(range(0, 10), 1, 1.0), Progress(range(5, 10), 1, 1.0, [9.0, 8, 7, 6, 5]))
    for step, loss in enumerate([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]):
        whole.update(step, loss, 0.1, 100)
        if step >= 5:
            half.update(step, loss, 0.1, 100)
    assert half.loss == whole.loss and half.tokens == 500
    assert half.line(9, 0.5, 0.1, 100).startswith("step    10/10 | loss ")


def test_the_picture_of_a_run():
    rows = [{"step": i, "loss": 5.0 - i} for i in range(4)] + [{"step": 4, "val_bpb": 1.5}]
    left, right = loss_figure(rows).axes
    assert left.lines[0].get_ydata().tolist() == [5, 4, 3, 2]
    assert right.lines[0].get_xydata().tolist() == [[4, 1.5]]
    assert all(ax.get_ylabel() for ax in (left, right)) and left.get_xlabel()
    assert len(loss_figure([]).axes) == 2                           # before the first step
