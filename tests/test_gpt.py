"The model against a second one written from the formulas, in NumPy; its caches, compiler, limits."
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.attention import KVCache
from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

SHAPE = {"sequence_len": 40, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_kv_head": 4, "n_embd": 32}
ADDITIONS = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True}
VARIANTS = {
    "plain": {}, "shared heads": {"n_kv_head": 2}, "one head": {"n_head": 1, "n_kv_head": 1},
    "no softcap": {"logit_softcap": 0.0}, "windows": {"window_pattern": "SL", "sequence_len": 640},
    "qk_scale": {"qk_scale": 1.2}, "rope base": {"rope_base": 100.0},
    "narrow": {"n_embd": 8, "n_head": 4, "n_kv_head": 1, **ADDITIONS},
    **{name: {name: True} for name in ADDITIONS},
    "everything": {**ADDITIONS, "n_kv_head": 2, "n_layer": 4, "qk_scale": 1.2, "window_pattern": "SSL",
                   "sequence_len": 640},
}


def random_model(dtype=torch.float64, **changes) -> GPT:
    "A model whose weights are all random: zeros would hide mistakes."
    model = GPT(GPTConfig(**{**SHAPE, **changes})).to(dtype)
    model.compute_dtype = dtype
    model.cos, model.sin = (table.to(dtype) for table in exact_rotation(model.config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def exact_rotation(config):
    "Cosines and sines in fp64: the model's own tables are rounded to fp32."
    half = config.n_embd // config.n_head // 2
    speed = torch.tensor([config.rope_base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(config.sequence_len)[:, None] * speed
    return angle.cos(), angle.sin()


def tokens(B, T, seed=0):
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------- the formulas, position by position


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turn(x, position, base):
    "Coordinates (i, i + D/2) as a complex number, turned by minus the angle."
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(-1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def reference(model, idx):
    "Logits (T, V) of one row: NumPy, fp64, a loop over positions and heads, no shared code."
    c, w = model.config, {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    H, K, D, T = c.n_head, c.n_kv_head, c.n_embd // c.n_head, len(idx)
    x = rms(w["transformer.wte.weight"][idx])
    if c.smear:
        before = np.vstack([np.zeros(c.n_embd), x[:-1]])
        n = w["smear_gate.weight"].shape[1]
        x = x + w["smear_lambda"] * sigmoid(x[:, :n] @ w["smear_gate.weight"].T) * before
    x0 = x
    for i in range(c.n_layer):
        p = f"transformer.h.{i}."
        if c.residual_scalars:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        a = rms(x)
        q, k, v = (a @ w[p + f"attn.c_{name}.weight"].T for name in "qkv")
        if c.value_embeds and i % 2 == (c.n_layer - 1) % 2:
            gate = w[p + "attn.value_gate.weight"]
            gate = 3 * sigmoid(a[:, :gate.shape[1]] @ gate.T)                       # (T, K)
            v = v + np.repeat(gate, D, 1) * w[p + "attn.value_embed.weight"][idx]
        letter = c.window_pattern[i % len(c.window_pattern)]
        window = T if letter == "L" or i == c.n_layer - 1 else math.ceil(c.sequence_len / 512) * 128
        out = np.zeros((T, H * D))
        for h in range(H):
            g = h // (H // K)
            qs, ks = (np.stack([c.qk_scale * rms(turn(m[t, n * D:(n + 1) * D], t, c.rope_base))
                                for t in range(T)]) for m, n in ((q, h), (k, g)))
            for t in range(T):
                first = max(0, t - window)
                e = np.exp(ks[first:t + 1] @ qs[t] / math.sqrt(D))
                out[t, h * D:(h + 1) * D] = e @ v[first:t + 1, g * D:(g + 1) * D] / e.sum()
        x = x + out @ w[p + "attn.c_proj.weight"].T
        x = x + np.maximum(rms(x) @ w[p + "mlp.c_fc.weight"].T, 0) ** 2 @ w[p + "mlp.c_proj.weight"].T
        if i == c.n_layer // 2:
            middle = x
    if c.backout:
        x = x - w["backout_lambda"] * middle
    logits = rms(x) @ w["lm_head.weight"].T
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_formulas(variant):
    model = random_model(**VARIANTS[variant])
    T = 300 if "window_pattern" in VARIANTS[variant] else 17     # longer than the window of 256
    idx = tokens(1, T)
    with torch.no_grad():
        np.testing.assert_allclose(model(idx)[0], reference(model, idx[0].numpy()), rtol=0, atol=1e-9)
        logits = torch.from_numpy(reference(model, idx[0].numpy()))
        targets = tokens(1, T, seed=1)
        targets[0, 3] = -1
        expected = torch.nn.functional.cross_entropy(logits, targets[0], ignore_index=-1)
        for model.chunk_tokens in (0, 7):
            assert abs(model(idx, targets) - expected) < 1e-9


def test_frozen_logits():
    "Numbers computed once by `reference`: a change of the function, in both at once, shows here."
    model = GPT(GPTConfig(**{**SHAPE, "n_layer": 2, "n_kv_head": 2, **ADDITIONS})).double()
    model.compute_dtype = torch.float64
    model.cos, model.sin = exact_rotation(model.config)
    with torch.no_grad():
        for n, p in enumerate(model.parameters(), 1):          # no random generator involved
            p.copy_((0.3 * torch.sin(n + torch.arange(p.numel(), dtype=torch.float64) ** 2)).view_as(p))
        logits = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))[0]
    np.testing.assert_allclose(logits[[0, 3, 7], :3], FROZEN, rtol=0, atol=1e-10)


FROZEN = [[0.594480231960, 0.144065338194, 0.429374454060],
          [1.611158903047, -0.358877039050, 1.160540596036],
          [1.439977298688, 0.397081936380, 1.911917493956]]


# --------------------------------------------------------------- properties of the whole model


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_sees_the_future(variant):
    model, idx = random_model(**VARIANTS[variant]), tokens(2, 20)
    changed = idx.clone()
    changed[:, 11] = (changed[:, 11] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)
    assert (before[:, 11] - after[:, 11]).abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.lists(st.integers(1, 9), min_size=1, max_size=5),
       st.integers(0, 1000))
def test_pieces_with_a_cache_equal_the_whole(variant, pieces, seed):
    "Chunked prefill and decoding, any split, give the logits of one full pass."
    model = random_model(**VARIANTS[variant])
    idx = tokens(2, sum(pieces), seed)
    cache = KVCache.for_model(model, 2, sum(pieces))
    with torch.inference_mode():
        made = [model(piece, kv_cache=cache) for piece in idx.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(made, 1), model(idx), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_different_lengths(variant):
    "Prompts padded on the right, then decoded together, equal each row alone."
    model, lengths = random_model(**VARIANTS[variant]), [1, 9, 4]
    idx = tokens(3, 9 + 5)
    cache = KVCache.for_model(model, 3, 14)
    with torch.inference_mode():
        model(idx[:, :9], kv_cache=cache)
        cache.lengths.copy_(torch.tensor(lengths))
        for step in range(5):
            new = torch.stack([idx[b, n + step] for b, n in enumerate(lengths)])[:, None]
            logits = model(new, kv_cache=cache)
            for b, n in enumerate(lengths):
                alone = model(idx[b:b + 1, :n + step + 1])[0, -1]
                torch.testing.assert_close(logits[b, 0], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.bfloat16, 0.15)])
def test_a_window_narrower_than_the_text(dtype, tolerance):
    "Pieces, and rows of different lengths, where the window of 128 hides most of what is stored."
    model = random_model(dtype, **{**VARIANTS["everything"], "sequence_len": 512})
    idx = tokens(2, 202)
    with torch.inference_mode():
        whole = model(idx)
        assert (whole - random_model(dtype, **{**VARIANTS["everything"], "sequence_len": 512,
                                               "window_pattern": "L"})(idx)).abs().max() > tolerance
        cache = KVCache.for_model(model, 2, 202)
        made = [model(piece, kv_cache=cache) for piece in idx.split([100, 60, 1, 1, 40], 1)]
        torch.testing.assert_close(torch.cat(made, 1), whole, rtol=0, atol=tolerance)
        cache, lengths = KVCache.for_model(model, 2, 202), [150, 131]
        model(idx[:, :150], kv_cache=cache)
        cache.lengths.copy_(torch.tensor(lengths))
        new = torch.stack([idx[b, n] for b, n in enumerate(lengths)])[:, None]
        logits = model(new, kv_cache=cache)[:, 0]
        alone = torch.stack([whole[b, n] for b, n in enumerate(lengths)])
        torch.testing.assert_close(logits, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("chunk_tokens, recompute", [(0, False), (16, True)])
def test_compiled_equals_eager(variant, chunk_tokens, recompute):
    "The whole training pass is one graph, and its loss and gradients are those of the eager one."
    model = random_model(torch.float32, **{**VARIANTS[variant], "n_layer": 3})
    model.chunk_tokens, model.recompute = chunk_tokens, recompute
    idx, targets = tokens(2, 24), tokens(2, 24, seed=1)
    targets[0, :5] = -1
    results = []
    torch._dynamo.reset()
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = function(idx, targets, reduction="sum")
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (eager, grads), (compiled, compiled_grads) = results
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        distance = (compiled_grads[name] - grad).norm() / grad.norm()
        assert distance < 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_memory_changes_no_gradient(variant):
    model, idx, targets = random_model(**VARIANTS[variant]), tokens(2, 20), tokens(2, 20, seed=1)
    targets[1, 4:9] = -1
    grads = []
    for model.chunk_tokens, model.recompute in [(0, False), (0, True), (16, False), (7, True)]:
        model.zero_grad()
        model(idx, targets).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_loss_and_overfitting(variant):
    model = GPT(GPTConfig(**{**SHAPE, **VARIANTS[variant]})).init_weights(0)
    idx, targets = tokens(4, 16), tokens(4, 16, seed=1)
    assert model(idx, targets).item() == pytest.approx(math.log(SHAPE["vocab_size"]), abs=1e-5)
    optimizer = setup_optimizer(model)
    for _ in range(200):
        loss = model(idx, targets)
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        if loss < 0.01:
            return
    raise AssertionError(f"one batch, 200 steps, and the loss is still {loss.item():.3f}")


def test_losses_by_reduction():
    model, idx, targets = random_model(), tokens(3, 10), tokens(3, 10, seed=1)
    targets[:, :4] = -1
    with torch.no_grad():
        each = model(idx, targets, reduction="none")
        assert each.shape == (3, 10) and (each[:, :4] == 0).all() and (each[:, 4:] > 0).all()
        torch.testing.assert_close(model(idx, targets, reduction="sum"), each.sum())
        torch.testing.assert_close(model(idx, targets), each.sum() / 18)
        torch.testing.assert_close(model.logits(model.hidden(idx)[:, -1]), model(idx)[:, -1])


def test_rotation_tables():
    model = GPT(GPTConfig(**{**SHAPE, "sequence_len": 2048}))
    for table, exact in zip((model.cos, model.sin), exact_rotation(model.config), strict=True):
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=2e-4)   # 2048 · 2⁻²⁴ radians


def test_weights_follow_the_seed():
    config = GPTConfig(**{**SHAPE, **ADDITIONS})
    a, b, c = (GPT(config).init_weights(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])
    plain = GPT(GPTConfig(**SHAPE)).init_weights(5).state_dict()
    assert set(plain) < set(a)


def test_counts():
    config = GPTConfig(**{**SHAPE, **ADDITIONS})
    gates = 2 * 12 * 4                                                # layers 0 and 2 of 3
    assert GPT(config).num_parameters() == {
        "wte": 61 * 32, "value_embeds": 2 * 61 * 32, "blocks": 3 * 12 * 32**2 + gates,
        "lm_head": 61 * 32, "scalars": 3 + 3 + 1 + 1 + 24,
        "total": 4 * 61 * 32 + 3 * 12 * 32**2 + gates + 32}
    # half the key/value heads: k and v are half as large; windows of 256 in two of three layers
    shared = GPT(GPTConfig(**{**SHAPE, "n_kv_head": 2, "window_pattern": "SSL", "sequence_len": 640}))
    matrices = 3 * (2 + 1 + 8) * 32**2 + 61 * 32
    assert shared.flops_per_token() == 6 * matrices + 12 * 32 * (256 + 256 + 640)
    with torch.device("meta"):
        d20 = GPT(GPTConfig())
    assert d20.num_parameters()["total"] == 560_988_160 and f"{d20.flops_per_token():.2e}" == "3.49e+09"


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("changes, words", [
    ({"n_embd": 30}, ["n_embd=30", "n_head=4", "try n_embd=32"]),
    ({"n_embd": 12}, ["head width 3", "odd", "try n_embd=16"]),
    ({"n_embd": 100, "n_head": 6, "n_kv_head": 6}, ["n_head=6", "try n_embd=108"]),
    ({"n_kv_head": 3}, ["n_kv_head=3", "n_head=4"]),
    ({"window_pattern": "SSX"}, ["'SSX'", "L and S", "SSSL"]),
    ({"window_pattern": ""}, ["window_pattern", "SSSL"]),
    ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
    ({"vocab_size": -1}, ["vocab_size=-1"]),
    ({"logit_softcap": -1.0}, ["logit_softcap=-1.0", "0 turns it off"]),
    ({"rope_base": 0.0}, ["rope_base=0.0"]),
    ({"qk_scale": -1.0}, ["qk_scale=-1.0"])])
def test_bad_configuration(changes, words):
    with pytest.raises(UserError) as error:
        GPTConfig(**{**SHAPE, **changes})
    assert all(word in str(error.value) for word in words), str(error.value)
    if advice := re.search(r"try (\w+)=(\d+)", str(error.value)):
        GPTConfig(**{**SHAPE, **changes, advice[1]: int(advice[2])})       # and it is good advice


def test_bad_tokens():
    model = random_model()
    with pytest.raises(UserError, match=r"token ids 3 … 61 .* vocabulary, 0 … 60"):
        model(torch.tensor([[3, 61]]))
    with pytest.raises(UserError, match="token ids -2"):
        model(torch.tensor([[-2, 5]]))
    with pytest.raises(UserError, match="41 tokens do not fit .* context of 40"):
        model(tokens(1, 41))
    with pytest.raises(UserError, match="holds 4 tokens"):
        model(tokens(1, 5), kv_cache=KVCache.for_model(model, 1, 4))
    cache = KVCache.for_model(model, 1, 60)
    model(tokens(1, 40), kv_cache=cache)
    with pytest.raises(UserError, match="context of 40"):
        model(tokens(1, 1), kv_cache=cache)
    with pytest.raises(UserError, match="mean"):
        model(tokens(1, 3), tokens(1, 3), reduction="average")


def test_built_without_memory_then_filled():
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE))
    model = model.to_empty(device="cpu").init_weights(3)
    straight = GPT(GPTConfig(**SHAPE)).init_weights(3)
    idx = tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(idx), straight.hidden(idx), rtol=0, atol=0)
