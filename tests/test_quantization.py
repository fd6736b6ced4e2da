"Packed models against the models they were made of; integers against their definition."
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.engine import Engine
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.quantization import (Int4Linear, Int8Linear, PackedLinear, dequantize, matrix_bytes, pack, pack_nibbles,
                                      quantize, unpack_nibbles)
from nanochat_nb.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


def random_model(dtype=torch.float32, seed=0, **changes):
    model = GPT(GPTConfig(**{**dict(sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=4, n_embd=64), **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=generator)
    model.compute_dtype = dtype
    return model


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from([0, 1, 2, 4, 8]), st.integers(1, 5), st.integers(0, 2**31), st.floats(-20, 20))
def test_rounding_is_to_the_nearest(bits, group, N, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, 16, generator=generator) * 2.0**exponent
    weight[torch.rand(N, 16, generator=generator) < 0.2] = 0
    q, scale = quantize(weight, bits, group)
    largest, size = 2 ** (bits - 1) - 1, group or 16
    assert q.dtype == torch.int8 and q.abs().max() <= largest and scale.shape == (N, 16 // size)
    for row, start in itertools.product(range(N), range(0, 16, size)):
        part, s = weight[row, start:start + size], scale[row, start // size].item()
        assert s == pytest.approx(part.abs().max().item() / largest, rel=2**-8, abs=1e-37)      # a bf16 number
        for value, integer in zip(part.tolist(), q[row, start:start + size].tolist()):
            best = min(range(-largest, largest + 1), key=lambda i: abs(value - i * s))
            assert abs(value - integer * s) <= abs(value - best * s) + 1e-6 * s
    assert torch.equal(dequantize(q, scale), q.float() * scale.repeat_interleave(size, 1))
    assert torch.equal(quantize(dequantize(q, scale), bits, group)[0].sign(), q.sign())


def test_refused():
    for bits, group in [(1, 0), (9, 0), (4, 5)]:
        with pytest.raises(UserError, match="whole groups"):
            quantize(torch.randn(2, 16), bits, group)
    with pytest.raises(UserError, match="int8, int4"):
        pack(random_model(), "fp4")


def test_nibbles_come_back():
    q = torch.randint(-8, 8, (7, 32), dtype=torch.int8)
    packed = pack_nibbles(q)
    assert packed.shape == (7, 16) and packed.dtype == torch.uint8 and torch.equal(unpack_nibbles(packed), q)


@pytest.mark.parametrize("layer, bound", [(PackedLinear, 1e-6), (Int8Linear, 0.012), (Int4Linear, 0.14)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64), (33, 32)])
def test_layers(layer, bound, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    made = layer(weight, torch.float32)
    assert made.weight.shape == shape
    for rows in (1, 5, 64, 65, 200):                       # both sides of where the kernels end
        x = torch.randn(rows, shape[1], generator=generator)
        y, exact = made(x), x @ weight.t()
        assert y.dtype == torch.float32
        assert (y - exact).norm() <= bound * exact.norm()
        assert (y - x @ made.weight.t()).norm() <= 1e-5 * exact.norm()          # it multiplies with what its integers stand for
        assert torch.allclose(made(x.view(1, rows, -1))[0], y)


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=2, window_pattern="SL"),
                                     dict(value_embeds=True, residual_scalars=True, smear=True, backout=True, qk_scale=1.2)])
def test_packed_model_is_the_model(changes):
    model, idx = random_model(**changes), torch.randint(300, (2, 50))
    packed = pack(model)
    assert torch.allclose(packed(idx), model(idx), atol=2e-4)
    assert torch.allclose(packed(idx[:, :-1], idx[:, 1:]), model(idx[:, :-1], idx[:, 1:]), atol=1e-5)
    assert packed.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert matrix_bytes(packed) == matrix_bytes(model)
    before = [p.clone() for p in model.parameters()]
    pack(model, "int4")(idx)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))      # and stays as it was


def test_bf16_is_what_the_model_computes_in_bf16():
    model, idx = random_model(torch.bfloat16), torch.randint(300, (2, 50))
    packed = pack(model)
    assert packed.lm_head.weight.dtype == packed.transformer.wte.weight.dtype == torch.bfloat16
    assert torch.allclose(packed(idx), model(idx), atol=0.15, rtol=0.05)           # the product of three is another one
    assert matrix_bytes(packed) < 0.51 * matrix_bytes(model)


def test_bytes_and_what_they_lose():
    model, idx = random_model(), torch.randint(300, (4, 60))
    exact = model(idx)
    sizes, errors = {}, {}
    for weights in ("", "int8", "int4"):
        packed = pack(model, weights)
        sizes[weights], errors[weights] = matrix_bytes(packed), ((packed(idx) - exact).norm() / exact.norm()).item()
    assert sizes["int8"] < 0.27 * sizes[""] and sizes["int4"] < 0.16 * sizes[""]
    assert errors[""] < 1e-5 < errors["int8"] < errors["int4"] / 4 < 0.25


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_engine_writes_what_the_rounded_model_says(weights):
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 4, 290)
    model = random_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)                       # no near ties: rounding must not decide
    rounded, prompt = pack(model, weights), [tokenizer.bos, 5, 6, 7]
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            tokens.append(int(rounded(torch.tensor([tokens]))[0, -1].argmax()))
    done = Engine(model, tokenizer, weights=weights).generate([prompt] * 3, 20, temperature=0, stop_ids=[])
    assert [c.tokens for c in done] == [tokens[4:]] * 3
