"The C code against PyTorch in 64 bits: every format, every addition to the model, every way it can be missing."
import copy
import ctypes
import os
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb import kernels
from nanochat_nb.attention import KVCache
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.quantization import Int4Linear, Int8Linear, PackedLinear, pack

if kernels.kernels() is None:
    pytest.skip("no C++ compiler here", allow_module_level=True)

ADDITIONS = dict(value_embeds=True, residual_scalars=True, smear=True, backout=True)
SHAPES = [{}, dict(n_kv_head=2, window_pattern="SL", sequence_len=600), dict(n_kv_head=1, qk_scale=1.3, **ADDITIONS),
          dict(n_head=1, n_kv_head=1, n_embd=104, **ADDITIONS), dict(n_head=8, n_kv_head=8, window_pattern="S", sequence_len=520)]


def random_model(seed=0, dtype=torch.float32, **changes) -> GPT:
    config = dict(sequence_len=300, vocab_size=320, n_layer=3, n_head=4, n_kv_head=4, n_embd=64)
    model = GPT(GPTConfig(**{**config, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=generator)
    model.compute_dtype = dtype
    return model.requires_grad_(False)


def layer_of(format: str, weight: torch.Tensor) -> PackedLinear:
    return {"fp32": lambda: PackedLinear(weight, torch.float32), "bf16": lambda: PackedLinear(weight, torch.bfloat16),
            "int8": lambda: Int8Linear(weight, torch.float32), "int4": lambda: Int4Linear(weight, torch.float32)}[format]()


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 64), outputs=st.integers(1, 24), inputs=st.integers(1, 9), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_product(format, rows, outputs, inputs, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = layer_of(format, torch.randn(4 * outputs, 32 * inputs, generator=generator))
    x = torch.randn(rows, 32 * inputs, generator=generator)
    exact = x.double() @ layer.weight.double().t()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert layer.fits and kernels.usable(x)
        y = kernels.product(x, layer.stored, layer.scale)
        assert y.dtype == torch.float32 and (y - exact).abs().max() <= 2e-6 * exact.abs().max() + 1e-6
        torch.set_num_threads(1)
        alone = torch.cat([kernels.product(row[None], layer.stored, layer.scale) for row in x])
        assert torch.equal(y, alone)                          # neighbours and threads change no bit
        assert torch.equal(layer(x.view(1, rows, -1)), y[None])
    finally:
        torch.set_num_threads(before)


def in_64_bits(packed: GPT, model: GPT) -> GPT:
    "The model of lesson 3 with exactly the numbers that a packed one stands for, in double precision."
    exact = copy.deepcopy(model)
    D = model.config.head_dim
    for ours, theirs in zip(packed.transformer.h, exact.transformer.h):
        H, K, _ = ours.attn.heads
        q, k, v = ours.attn.c_qkv.weight.split([H * D, K * D, K * D])
        for to, weight in ((theirs.attn.c_q, q), (theirs.attn.c_k, k), (theirs.attn.c_v, v), (theirs.attn.c_proj, ours.attn.c_proj.weight),
                           (theirs.mlp.c_fc, ours.mlp.c_fc.weight), (theirs.mlp.c_proj, ours.mlp.c_proj.weight)):
            to.weight.copy_(weight)
    exact.lm_head.weight.copy_(packed.lm_head.weight)
    exact = exact.double()
    exact.compute_dtype = torch.float64
    return exact


def filled(model: GPT, lengths: list[int], seed=1) -> KVCache:
    cache = KVCache.for_model(model, len(lengths), model.config.sequence_len)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.lengths.copy_(torch.tensor(lengths))
    return cache


@pytest.mark.parametrize("weights", ["", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_step_is_the_models(shape, weights, monkeypatch):
    model = random_model(**shape)
    packed = pack(model, weights)
    exact, lengths = in_64_bits(packed, model), [0, 1, 2, 3, 4, 7, 8, 131, 298]
    ours, theirs = filled(model, lengths), filled(exact, lengths)
    called = []
    monkeypatch.setattr(kernels.DecodeBlock, "__call__",
                        lambda self, *args, real=kernels.DecodeBlock.__call__: called.append(1) or real(self, *args))
    for step in range(2):
        ids = torch.randint(320, (len(lengths), 1), generator=torch.Generator().manual_seed(step))
        a, b = packed(ids, kv_cache=ours), exact(ids, kv_cache=theirs)
        assert (a - b).abs().max() < 2e-4
        assert (ours.keys - theirs.keys).abs().max() < 1e-4 and (ours.values - theirs.values).abs().max() < 1e-4
        assert torch.equal(ours.lengths, theirs.lengths)
    assert len(called) == (0 if shape.get("n_embd") == 104 and weights == "int4" else 6)  # 104 is no whole number of groups


@pytest.mark.parametrize("shape", [*SHAPES[:2], {**SHAPES[2], "smear": False}])   # its gate is PyTorch's product
@torch.no_grad()
def test_neighbours_change_no_bit(shape):
    model, lengths = pack(random_model(**shape)), [5, 200, 0, 64, 31]
    together = filled(model, lengths)
    alone = [together.select(torch.tensor([i])) for i in range(5)]
    for step in range(3):
        ids = torch.randint(320, (5, 1), generator=torch.Generator().manual_seed(step))
        logits = model(ids, kv_cache=together)
        for i in range(5):
            assert torch.equal(logits[i], model(ids[i:i + 1], kv_cache=alone[i])[0])


@torch.no_grad()
def test_in_bf16():
    "Weights, cache and stream as the model computes; the sums in between are finer than PyTorch's."
    model = random_model(dtype=torch.bfloat16, **SHAPES[2])
    packed, lengths = pack(model), [3, 17, 250]
    exact = in_64_bits(packed, model)
    ours, plain = filled(model, lengths), filled(model, lengths)
    theirs = filled(exact, lengths)
    theirs.keys.copy_(ours.keys), theirs.values.copy_(ours.values)
    ids = torch.tensor([[1], [2], [3]])
    truth, a, b = exact(ids, kv_cache=theirs), packed(ids, kv_cache=ours), model(ids, kv_cache=plain)
    assert ours.keys.dtype == torch.bfloat16 and a.dtype == torch.float32
    assert (a - truth).norm() <= 1.2 * (b - truth).norm() and (a - truth).norm() < 0.03 * truth.norm()


def library(source: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(kernels.build(source)))


def test_exponential():
    made = library(kernels.VECTORS + kernels.PRODUCT + kernels.ATTENTION + """
        extern "C" void all(const float* x, float* y, int64_t n) { for (long i = 0; i < n; i += 8) *(vec*)(y + i) = exps(eight(x + i)); }""")
    x = torch.cat([-torch.rand(80_000, generator=torch.Generator().manual_seed(0)) * 87, -torch.rand(8_000) * 1e-3, torch.zeros(8)])
    y = torch.empty_like(x)
    made.all(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
    assert ((y - x.double().exp()).abs() / x.double().exp()).max() < 3e-7 and (y[-8:] == 1).all()
    x = torch.tensor([-100, -1e30, -torch.inf, -87.0, torch.nan, torch.nan, 0, 0])
    made.all(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(8))
    assert (y[:4] < 2e-38).all() and y[4:6].isnan().all()


@pytest.mark.parametrize("part", ["attn.c_qkv", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@torch.no_grad()
def test_nan_is_not_lost(part):
    "A damaged weight must reach the logits, where sampling refuses it."
    packed = pack(random_model())
    packed.transformer.h[1].get_submodule(part).stored[5, 3] = torch.nan
    assert packed(torch.tensor([[1]]), kv_cache=filled(packed, [9])).isnan().any()


@torch.no_grad()
def test_what_the_kernels_leave_to_pytorch():
    model, ids = random_model(), torch.tensor([[1]] * 65)
    assert not kernels.usable(torch.zeros(65, 8)) and kernels.usable(torch.zeros(64, 8)) and not kernels.usable(torch.zeros(0, 8))
    assert not kernels.usable(torch.zeros(2, 8, dtype=torch.float64)) and not kernels.usable(torch.zeros(2, 8, device="meta"))
    with torch.enable_grad():
        assert not kernels.usable(torch.zeros(2, 8, requires_grad=True))
    for N, K in ((6, 64), (64, 12)):
        layer = PackedLinear(torch.randn(N, K), torch.float32)
        assert not layer.fits and torch.allclose(layer(torch.ones(3, K)), layer.weight.sum(1).expand(3, N), atol=1e-5)
    assert not PackedLinear(torch.randn(64, 64).t()[::2], torch.float64).fits
    many = pack(model)(ids, kv_cache=filled(model, [40] * 65))                # more rows than the kernels take
    assert torch.allclose(many, model(ids, kv_cache=filled(model, [40] * 65)), atol=1e-4)
    odd = random_model(n_embd=60, n_head=5, n_kv_head=5, vocab_size=301)      # 12 numbers a head
    assert torch.allclose(pack(odd)(ids, kv_cache=filled(odd, [7] * 65)), odd(ids, kv_cache=filled(odd, [7] * 65)), atol=1e-4)


@torch.no_grad()
def test_a_copy_has_addresses_of_its_own():
    model, ids = random_model(), torch.tensor([[3]])
    packed = pack(model)
    expected = packed(ids, kv_cache=filled(model, [20]))                      # has made its calls
    copied = copy.deepcopy(packed)
    for buffer in packed.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    del packed
    assert torch.equal(copied(ids, kv_cache=filled(model, [20])), expected)
    copied.half().float()                                                     # moved there and back: rounded weights
    rounded = copied(ids, kv_cache=filled(model, [20]))
    assert not torch.equal(rounded, expected) and torch.allclose(rounded, expected, atol=0.05)


def script(path, text: str):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def answers(environment: dict, source: str = "") -> list[str]:
    "What a fresh process says of its kernels and of one product."
    code = f"""
import warnings, torch
warnings.simplefilter("always")
from nanochat_nb import kernels
from nanochat_nb.quantization import PackedLinear
{source}
x, layer = torch.arange(64.).view(2, 32).cos(), PackedLinear(torch.arange(256.).view(8, 32).sin(), torch.float32)
with warnings.catch_warnings(record=True) as told:
    y = layer(x)
print(kernels.kernels() is not None)
print(torch.allclose(y, x @ layer.weight.t(), atol=1e-4))
print(" ".join(" ".join(str(w.message).split()) for w in told))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:3]


def test_without_a_compiler_and_with_a_bad_one(tmp_path):
    base = {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    assert answers({**base, "NANOCHAT_KERNELS": "0"}) == ["False", "True", ""]
    assert answers({**base, "PATH": str(tmp_path)}) == ["False", "True", ""]
    [real] = kernels._compiler()
    broken = script(tmp_path / "broken", 'case "$*" in *--version*) exit 0;; esac\necho "disk full, or so" >&2\nexit 1\n')
    found = answers({**base, "CXX": broken})
    assert found[:2] == ["False", "True"] and "could not be compiled" in found[2] and "disk full, or so" in found[2]
    assert answers({**base, "CXX": f"env WITH=spaces {real}"}) == ["True", "True", ""]
    found = answers({**base, "CXX": str(tmp_path / "nobody")})
    assert found[:2] == ["False", "True"] and "could not be compiled" in found[2]
    no_openmp = script(tmp_path / "plain", f'case "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    assert answers({**base, "CXX": no_openmp}) == ["True", "True", ""]         # one thread, and right
    old = script(tmp_path / "old", f'exec {real} "$@" {"-march=x86-64" if os.uname().machine == "x86_64" else ""}\n')
    assert answers({**base, "CXX": old}) == ["True", "True", ""]               # no AVX
    assert "multiply_add(row, xs[r]" in kernels.PRODUCT
    wrong = 'kernels.PRODUCT = kernels.PRODUCT.replace("multiply_add(row, xs[r]", "multiply_add(-row, xs[r]")'
    found = answers(base, wrong)
    assert found[:2] == ["False", "True"] and "came out wrong" in found[2]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="asks GCC for an older processor")
def test_older_processors_compute_the_same(tmp_path, monkeypatch):
    "The code without AVX, here as on other machines: every format, and attention."
    old = script(tmp_path / "old", f'exec {kernels._compiler()[0]} "$@" -march=x86-64\n')
    generator = torch.Generator().manual_seed(0)
    model, ids = random_model(**SHAPES[1]), torch.tensor([[1], [2], [3]])
    layers = [layer_of(format, torch.randn(12, 64, generator=generator)) for format in ("fp32", "bf16", "int8", "int4")]
    x = torch.randn(8, 64, generator=generator)

    def everything():
        with torch.no_grad():
            step = pack(model)(ids, kv_cache=filled(model, [10, 100, 200]))
        return [layer(x) for layer in layers] + [step]

    here = everything()
    monkeypatch.setenv("CXX", old)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    kernels.kernels.cache_clear()
    try:
        assert kernels.kernels()._name.startswith(str(tmp_path))
        there = everything()
    finally:
        kernels.kernels.cache_clear()
    for a, b in zip(here, there):
        assert torch.allclose(a, b, atol=1e-4)


def test_compiled_once_for_all_processes(tmp_path, monkeypatch):
    "Eight at a time: each gets a whole library; afterwards nobody compiles."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    count = tmp_path / "count"
    monkeypatch.setenv("CXX", script(tmp_path / "counting", f'case "$*" in *--version*) ;; *) echo x >> {count};; esac\nexec {kernels._compiler()[0]} "$@"\n'))
    source = 'extern "C" int seven() { return 7; }'
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: kernels.build(source), range(8)))
    assert len(paths) == 1 and ctypes.CDLL(str(paths.pop())).seven() == 7
    times = len(count.read_text().split())
    kernels.build(source)
    assert len(count.read_text().split()) == times
    assert sorted(p.suffix for p in (tmp_path / "kernels").iterdir()) == [".so"]      # nothing else is left behind
    kernels.build(source + " ")
    assert len(count.read_text().split()) > times


def test_threads_at_once():
    "Four threads decode with models of their own: buffers in C belong to their thread."
    models = [pack(random_model(seed)) for seed in range(4)]
    ids = torch.tensor([[5], [6]])

    def decode(model):
        with torch.no_grad():
            return [model(ids, kv_cache=filled(model, [30, 60])) for _ in range(25)]

    expected = [decode(model)[0] for model in models]
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        for made, right in zip(pool.map(decode, models), expected):
            assert all(torch.equal(m, right) for m in made)
