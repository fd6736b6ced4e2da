"Every attention backend against the formula, the rule that picks one, and the cache against both."
import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention as torch_attention
from torch.nn.attention import varlen

from nanochat_nb import attention as module
from nanochat_nb.attention import (BACKENDS, KVCache, attention, attention_naive, attention_pieces,
                                   attention_strips, choose_backend, explain_backends, piece_length)
from nanochat_nb.common import UserError

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

ON_CPU = [None, "sdpa", "sdpa.math", "sdpa.flash", "pieces", "strips"]
# examples are not kept between runs: a failing one is printed, and belongs into a test of its own
quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def tensors(T, H=2, K=2, D=8, B=2, seed=0, dtype=torch.float64, grad=False):
    "Random queries, keys and values."
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, T, D, generator=generator, dtype=dtype).requires_grad_(grad)
                 for heads in (H, K, K))


def with_gradients(function, inputs):
    "What a function gives, and the gradients of a loss that weighs every number differently."
    y = function(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def largest_difference(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- the formula

def plain_python(q, k, v, window):
    "Attention of one head, with Python's own floats: lists of T lists of D."
    out = []
    for t, query in enumerate(q):
        seen = range(max(0, t - window) if window >= 0 else 0, t + 1)
        scores = [sum(a * b for a, b in zip(query, k[s])) / math.sqrt(len(query)) for s in seen]
        weights = [math.exp(x - max(scores)) for x in scores]
        out.append([sum(w * v[s][d] for w, s in zip(weights, seen)) / sum(weights)
                    for d in range(len(query))])
    return out


Q = [[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0], [0.0, 1.0]]
K = [[1.0, 0.0], [-0.5, 1.5], [0.25, -2.0], [2.0, 0.5]]
V = [[1.0, 10.0], [2.0, 20.0], [3.0, 40.0], [4.0, 80.0]]
FROZEN = {   # window → output, computed once by `plain_python`
    -1: [[1.0, 10.0],
         [1.2098507621356178, 12.098507621356177],
         [1.9533976300758964, 19.578930628186143],
         [2.376446751400784, 34.45581671644227]],
    1: [[1.0, 10.0],
         [1.2098507621356178, 12.098507621356177],
         [2.0047375090450332, 20.094750180900665],
         [3.8541797500063812, 74.16719000025523]],
    0: [[1.0, 10.0],
         [2.0, 20.0],
         [3.0, 40.0],
         [4.0, 80.0]],
    2: [[1.0, 10.0],
         [1.2098507621356178, 12.098507621356177],
         [1.9533976300758964, 19.578930628186143],
         [2.678596430214508, 39.82421702577525]],
}


@pytest.mark.parametrize("window", FROZEN)
def test_frozen_numbers(window):
    q, k, v = (torch.tensor(rows, dtype=torch.float64)[None, None] for rows in (Q, K, V))
    expected = torch.tensor(FROZEN[window], dtype=torch.float64)
    for backend in ["naive", *ON_CPU]:
        y = attention(q, k, v, window, backend)[0, 0]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@quick
@given(st.integers(1, 12), st.integers(1, 5), st.integers(-1, 13), st.integers(0, 99))
def test_the_yardstick_itself(T, D, window, seed):
    q, k, v = tensors(T, 4, 2, D, 1, seed)
    y = attention_naive(q, k, v, window)[0]
    for head in range(4):       # heads 0, 1 share the first key head, 2, 3 the second
        expected = plain_python(q[0, head].tolist(), k[0, head // 2].tolist(),
                                v[0, head // 2].tolist(), window)
        torch.testing.assert_close(y[head].tolist(), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- backends

shapes = st.fixed_dictionaries(dict(
    T=st.one_of(st.integers(1, 40), st.integers(200, 330)), D=st.integers(2, 130),
    K=st.integers(1, 3), B=st.integers(1, 3), seed=st.integers(0, 99)))


@quick
@given(shapes, st.integers(1, 3), st.integers(-1, 340), st.sampled_from(ON_CPU))
def test_backends_equal_the_formula(shape, groups, window, backend):
    inputs = tensors(H=groups * shape["K"], grad=True, **shape)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, window, backend), inputs)
    theirs = with_gradients(lambda q, k, v: attention_naive(q, k, v, window), inputs)
    assert largest_difference(ours, theirs) < 1e-12


@quick
@given(st.integers(1, 60), st.integers(-1, 70), st.integers(1, 70))
def test_strips_of_any_length(T, window, strip):
    inputs = tensors(T, 4, 2, 3, grad=True)
    ours = with_gradients(lambda q, k, v: attention_strips(q, k, v, window, strip), inputs)
    theirs = with_gradients(lambda q, k, v: attention_naive(q, k, v, window), inputs)
    assert largest_difference(ours, theirs) < 1e-12


@quick
@given(st.integers(2, 60), st.data())
def test_pieces_of_any_length(T, data):
    window, piece = data.draw(st.integers(0, T - 2)), data.draw(st.integers(1, 70))
    inputs = tensors(T, 4, 2, 3, grad=True)
    ours = with_gradients(lambda q, k, v: attention_pieces(q, k, v, window, piece), inputs)
    theirs = with_gradients(lambda q, k, v: attention_naive(q, k, v, window), inputs)
    assert largest_difference(ours, theirs) < 1e-12


def test_pieces_do_not_hold_a_square(monkeypatch):
    "The work is T·(window + piece), the mask (piece, window + piece)."
    calls = []
    fused = module.fused
    monkeypatch.setattr(module, "fused", lambda q, k, v, mask=None: calls.append(
        (q.size(0) * q.size(2) * k.size(2), 0 if mask is None else mask.numel())
    ) or fused(q, k, v, mask))
    T, window = 4096, 256
    attention(*tensors(T, B=1), window, "pieces")
    scores, masks = (sum(column) for column in zip(*calls))
    piece = piece_length(window)
    assert scores <= (T + piece) * (window + piece) < T * T / 10
    assert masks == piece * (window + piece)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(dtype):
    inputs = tensors(400, 4, 2, 64, dtype=dtype)
    exact = attention_naive(*(x.double() for x in inputs), 70)
    for backend in ON_CPU:
        y = attention(*inputs, 70, backend)
        assert y.dtype == dtype
        assert (y.double() - exact).norm() / exact.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_equals_the_formula():
    "On a CPU unfused and forward only: the mask and the shapes are tested, not the kernel."
    for T, window, D in [(1, -1, 16), (37, -1, 16), (130, 20, 8)]:
        q, k, v = tensors(T, 4, 2, D)
        y = attention(q, k, v, window, "flex")
        torch.testing.assert_close(y, attention_naive(q, k, v, window), rtol=0, atol=1e-12)


@pytest.fixture
def flash_stand_in(monkeypatch):
    "FlashAttention's place taken by the formula: checks what our adapter hands over, no kernel."
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
        B, T = len(cu_seq_q) - 1, max_q
        assert q.shape[0] == k.shape[0] == v.shape[0] == B * T and q.dim() == 3 and max_k == T
        assert cu_seq_q.dtype == torch.int32 and cu_seq_k is cu_seq_q
        if not torch.compiler.is_compiling():           # a graph may not ask for values
            assert cu_seq_q.tolist() == [b * T for b in range(B + 1)]
        assert window_size[1] == 0                      # nobody looks ahead
        assert enable_gqa == (q.size(1) != k.size(1))
        seen.append(window_size[0])
        q, k, v = (x.view(B, T, -1, x.size(-1)).transpose(1, 2) for x in (q, k, v))
        y = attention_naive(q, k, v, window_size[0])
        return y.transpose(1, 2).reshape(B * T, y.size(1), -1)

    seen = []
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return seen


@pytest.mark.parametrize("T, window, H, K", [(1, -1, 2, 2), (9, -1, 4, 2), (9, 3, 4, 2),
                                             (9, 0, 6, 1), (9, 8, 2, 2), (9, 50, 2, 2)])
def test_flash_adapter(flash_stand_in, T, window, H, K):
    q, k, v = tensors(T, H, K)
    y = attention(q, k, v, window, "flash")
    torch.testing.assert_close(y, attention_naive(q, k, v, window), rtol=0, atol=1e-12)
    assert flash_stand_in == [window if window < T - 1 else -1]


@pytest.mark.parametrize("window", [-1, 70])
def test_flash_call_fits_what_torch_has(monkeypatch, window):
    "The real `varlen_attn`, on tensors without numbers that claim to be on a GPU: shapes only."
    monkeypatch.setattr(module, "_cuda_kernels", lambda: (2, True))
    with FakeTensorMode():
        q, k, v = (torch.empty(2, heads, 300, 64, device="cuda", dtype=torch.bfloat16)
                   for heads in (4, 2, 2))
        y = attention(q, k, v, window, "flash")
    assert y.shape == q.shape and y.dtype == q.dtype and y.device == q.device


def test_flash_3_and_4_are_put_behind_the_call(flash_stand_in, monkeypatch):
    installed = []

    class Handle:
        def __init__(self, name):
            installed.append(name)
            self.remove = lambda: installed.remove(name)

    for name in ("FA3", "FA4"):
        monkeypatch.setitem(torch_attention._registry._FLASH_ATTENTION_IMPLS, name,
                            lambda name=name: Handle(name))
    q, k, v = tensors(5)
    try:
        for generation, expected in [(2, []), (3, ["FA3"]), (3, ["FA3"]), (4, ["FA4"])]:
            monkeypatch.setattr(module, "gpu_kernels", lambda device: (generation, True))
            attention(q, k, v, 2, "flash")
            assert installed == expected
    finally:
        torch_attention.restore_flash_attention_impl(_raise_warn=False)


def check_bf16(device, backend, T, window, K):
    "Forward and backward in bf16 against the formula in fp64, by the size of all that comes out."
    inputs = [x.to(device, torch.bfloat16) for x in tensors(T, 4, K, 64)]
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    y, expected = attention(*inputs, window, backend), attention_naive(*exact, window)
    assert y.dtype == torch.bfloat16 and y.device.type == device
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    ours = [y, *torch.autograd.grad(y, inputs, weights)]
    theirs = [expected, *torch.autograd.grad(expected, exact, weights.double())]
    size = max(x.norm() for x in theirs)        # one scale: some gradients are 0, as of q at T = 1
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 4 * torch.finfo(torch.bfloat16).eps * size


@pytest.mark.parametrize("backend", [None, "sdpa", "sdpa.flash", "sdpa.math", "pieces", "strips"])
def test_bf16_gradients(backend):
    for T, window, K in [(1, -1, 4), (37, 0, 2), (300, -1, 2), (300, 70, 4)]:
        check_bf16("cpu", backend, T, window, K)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("T", [1, 37, 300])
@pytest.mark.parametrize("backend", [None, "sdpa", "pieces", "flex", "flash",
                                     "sdpa.cudnn", "sdpa.flash", "sdpa.efficient"])
def test_gpu_kernels_equal_the_formula(backend, T):
    flash, triton = module.gpu_kernels("cuda")
    if backend == "flash" and not flash or backend == "flex" and not triton:
        pytest.skip("this machine has none")
    if backend == "sdpa.cudnn" and T == 1:
        pytest.skip("PyTorch gives cuDNN no key length of 1")
    for window, K in itertools.product((-1, 0, 9, 70), (4, 2)):
        windowed = 0 <= window < T - 1
        if windowed and backend in ("sdpa.cudnn", "sdpa.flash"):
            continue            # flash takes no masks, and we give none to cuDNN
        if backend == "sdpa.efficient" and K == 2 and not windowed:
            continue            # not every version of it knows groups
        check_bf16("cuda", backend, T, window, K)


# ---------------------------------------------------------------- the rule

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("facts, full, windowed", [     # device, dtype, width, T, flash, Triton
    (("cpu", fp32, 64, 2048), "sdpa", "pieces"),
    (("cpu", bf16, 64, 256), "sdpa", "sdpa"),
    (("mps", fp32, 64, 2048), "sdpa", "pieces"),
    # Hopper with flash-attn 3, Blackwell with 4, any of them from Ampere on without a package
    (("cuda", bf16, 128, 2048, 3, True), "flash", "flash"),
    (("cuda", bf16, 128, 2048, 4, True), "flash", "flash"),
    (("cuda", bf16, 128, 2048, 2, True), "sdpa", "flash"),
    # what flash cannot compute: fp32, odd widths, wide heads
    (("cuda", fp32, 128, 2048, 3, True), "sdpa", "flex"),
    (("cuda", bf16, 100, 2048, 3, True), "sdpa", "flex"),
    (("cuda", bf16, 192, 2048, 4, True), "sdpa", "flex"),
    (("cuda", torch.float64, 64, 2048, 3, True), "sdpa", "pieces"),     # Triton neither
    # an older GPU, or a PyTorch without these kernels
    (("cuda", fp16, 128, 2048), "sdpa", "pieces"),
])
def test_rule(facts, full, windowed):
    T = facts[3]
    for window, expected in [(-1, full), (T // 4, windowed), (0, windowed), (T - 2, windowed),
                             (T - 1, full), (T, full), (10 * T, full)]:
        assert choose_backend(*facts[:4], window, *facts[4:]) == expected
        compiled = choose_backend(*facts[:4], window, *facts[4:], compiling=True)
        assert compiled == ("strips" if facts[0] == "cpu" else expected)


def test_strips_only_while_their_weights_are_small():
    for T, full, windowed in [(1, "strips", "strips"), (2048, "strips", "strips"),
                              (2049, "sdpa", "pieces")]:
        for window, expected in [(-1, full), (T // 4, windowed)]:
            assert choose_backend("cpu", bf16, 64, T, window, compiling=True) == expected


@quick
@given(st.sampled_from(["cpu", "mps", "cuda"]), st.sampled_from([bf16, fp16, fp32]),
       st.integers(1, 300), st.integers(1, 9000), st.integers(-1, 9000),
       st.sampled_from([0, 2, 3, 4]), st.booleans())
def test_no_dense_mask_on_long_texts(device, dtype, head_dim, T, window, flash, triton):
    gpu = device == "cuda"
    name = choose_backend(device, dtype, head_dim, T, window, flash * gpu, triton and gpu)
    assert name in ("sdpa", "pieces", "flex", "flash")
    assert name != "sdpa" or T <= 256 or window < 0 or window >= T - 1


def test_explanation_says_what_is_done(monkeypatch):
    text = explain_backends("cpu", fp32, T=2048, window=512)
    assert all(f"\n  {name} " in text for name in BACKENDS if "." not in name)
    assert "full layers: sdpa; layers with a window of 512: pieces" in text
    assert text.count("no: wants CUDA, Ampere or later, and ") == 2
    monkeypatch.setattr(module, "gpu_kernels", lambda device: (2, True))
    text = explain_backends("cuda", bf16, T=2048, window=512)
    assert "cudnn, flash, efficient, math" in text
    columns = {row.rindex("  yes") for row in text.splitlines()[1:-1]}
    assert len(columns) == 1                                # a table, also with the longer text
    last = "full layers: sdpa; layers with a window of 512: flash"
    assert text.splitlines()[-1] == last == module.explain_choice("cuda", bf16, 128, 2048, 512)
    assert module.explain_choice("cpu", fp32, 64, 2048) == "full layers: sdpa"


def test_attention_follows_the_rule(monkeypatch):
    used = []
    for name, function in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, lambda *args, name=name, function=function:
                            used.append(name) or function(*args))
    for T, window, expected in [(300, -1, "sdpa"), (300, 299, "sdpa"), (300, 298, "pieces"),
                                (300, 0, "pieces"), (256, 30, "sdpa"), (1, 0, "sdpa")]:
        attention(*tensors(T, B=1), window)
        assert used.pop() == expected == choose_backend("cpu", torch.float64, 8, T, window)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.parametrize("gpu, packages, expected", [
    ((9, 0), ["flash_attn_interface", "triton"], (3, True)), ((9, 0), ["triton"], (2, True)),
    ((9, 0), ["flash_attn.cute", "triton"], (4, True)), ((10, 0), ["flash_attn.cute"], (4, False)),
    ((9, 0), ["flash_attn_interface", "flash_attn.cute", "triton"], (3, True)),
    ((10, 0), ["flash_attn_interface", "triton"], (2, True)),
    ((8, 9), ["flash_attn.cute"], (2, False)),
    ((7, 5), ["triton", "flash_attn_interface"], (0, False))])
def test_what_a_made_up_gpu_can_run(monkeypatch, gpu, packages, expected):
    assert module._cuda_kernels.__wrapped__() == (0, False)         # there is none yet
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "_installed", packages.__contains__)
    monkeypatch.setattr(module, "_starts", lambda generation: True)
    assert module._cuda_kernels.__wrapped__() == expected
    assert module.gpu_kernels("cpu") == module.gpu_kernels("mps") == (0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError, OSError])
@pytest.mark.parametrize("broken, expected", [({"FA3", "FA4"}, 2), ({"FA3"}, 4), ({"FA4"}, 3)])
def test_broken_packages_do_not_stop_training(monkeypatch, error, broken, expected):
    "Found, but built for something else: the next best is taken, and a warning says why."
    class Handle:
        remove = staticmethod(lambda: None)

    def register(name):
        if name in broken:
            raise error("undefined symbol")
        return Handle

    for name in ("FA3", "FA4"):
        monkeypatch.setitem(torch_attention._registry._FLASH_ATTENTION_IMPLS, name,
                            lambda name=name: register(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "_installed", lambda package: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert module._cuda_kernels.__wrapped__() == (expected, True)
    assert torch_attention.current_flash_attention_impl() is None   # tried, and taken back
    said = [str(w.message) for w in caught if "does not start" in str(w.message)]
    assert len(said) == len(broken - {"FA4"} if expected == 3 else broken)
    assert all("undefined symbol" in text for text in said)


def test_packages_are_looked_for_without_importing_them(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    assert not module._installed("flash_attn_interface")
    assert not module._installed("flash_attn.cute")         # not even its parent is there
    monkeypatch.syspath_prepend(tmp_path)
    assert module._installed("flash_attn_interface")


def test_import_starts_nothing():
    code = ("import sys, nanochat_nb.attention; "
            "print([m for m in ('torch._dynamo', 'torch.nn.attention.varlen', "
            "'torch.nn.attention.flex_attention') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", ["nonsense", "sdpa.nonsense", "pieces.math", ""])
def test_unknown_backend(backend):
    with pytest.raises(UserError, match="leave it out"):
        attention(*tensors(4), backend=backend)


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match="3 query heads cannot share 2"):
        attention(*tensors(4, H=3, K=2))


# ---------------------------------------------------------------- compiled

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [-1, 70])
def test_compiled_equals_eager(window):
    "One graph without breaks, forward and backward, for every T."
    def layer(q, k, v):
        return attention(q * 1.5, k, v, window)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (300, 411, 520, 200):      # 411: no multiple of a piece; 200: a window is a dense mask
        inputs = tensors(T, 4, 2, 16, grad=True)
        ours, theirs = with_gradients(compiled, inputs), with_gradients(layer, inputs)
        assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_inductor_equals_eager():
    "The compiler that training uses, on a windowed layer."
    def layer(q, k, v):
        return attention(q * 1.5, k, v, 70)

    inputs = tensors(300, 4, 2, 16, dtype=torch.float32, grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    ours, theirs = with_gradients(compiled, inputs), with_gradients(layer, inputs)
    assert largest_difference(ours, theirs) < 1e-5


def test_flash_compiles(flash_stand_in):
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, 3, "flash"),
                             fullgraph=True, backend="eager")
    q, k, v = tensors(9)
    torch.testing.assert_close(compiled(q, k, v), attention_naive(q, k, v, 3))


def test_questions_to_the_machine_do_not_break_the_graph():
    "As on a GPU: the search for packages happens while compiling."
    asked = []

    @module._asked_once
    def machine():
        asked.append(module._installed("flash_attn_interface"))
        return 2, True

    def run(x):
        flash, triton = machine()
        return x * flash if triton else x

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for _ in range(3):
        assert compiled(torch.ones(1)).item() == 2
    assert len(asked) == 1


def fake_gpu_case(masked):
    "Queries, keys, values and a mask without numbers that claim to be on a GPU."
    q, k, v = (torch.empty(2, heads, 300, 64, device="cuda", dtype=torch.bfloat16)
               for heads in (4, 2, 2))
    return q, k, v, torch.ones(300, 300, device="cuda", dtype=torch.bool) if masked else None


@pytest.mark.parametrize("masked, causal, expected", [
    (False, True, (True, True, 2)), (False, False, (False, False, 2)),
    (True, True, (False, False, 4))])       # 4: with a mask, key heads are repeated
def test_cudnn_is_for_plainly_causal_calls(monkeypatch, masked, causal, expected):
    "May cuDNN be taken, is it causal, how many key heads: what PyTorch's call sees on a GPU."
    def spy(q, k, v, mask, *, is_causal, enable_gqa):
        assert enable_gqa == (q.size(1) != k.size(1))
        calls.append((torch.backends.cuda.cudnn_sdp_enabled(), is_causal, k.size(1)))
        return real(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)

    calls, real = [], module.F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    with FakeTensorMode():
        q, k, v, mask = fake_gpu_case(masked)
        assert module.fused(q, k, v, mask, causal=causal).shape == q.shape
    assert calls == [expected]
    assert torch.backends.cuda.cudnn_sdp_enabled()          # put back in the end


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
def test_leaving_cudnn_out_compiles(masked):
    "One graph without breaks, in which cuDNN is switched off before the call and on after it."
    steps = []

    def backend(graph, inputs):
        steps.extend((node.target.__name__, str(node.args)) for node in graph.graph.nodes
                     if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: module.fused(*args), fullgraph=True, backend=backend)
    with FakeTensorMode():
        q, k, v, mask = fake_gpu_case(masked)
        assert compiled(q, k, v, mask).shape == q.shape
    names = [f"{name} {args}" for name, args in steps]
    call = next(i for i, name in enumerate(names) if name.startswith("scaled_dot_product"))
    switches = [i for i, name in enumerate(names) if name.startswith("_sdpa_kernel ")]
    cudnn = [i for i, name in enumerate(names) if "CUDNN" in name]
    if masked:
        before, after = switches
        assert before < call < cudnn[0] < after and len(cudnn) == 1
    else:
        assert not switches and not cudnn
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_gets_nothing_from_the_cache(monkeypatch):
    "Of what a cache asks for only a prefill is plainly causal, and only that may go to cuDNN."
    calls, fused = [], module.fused
    monkeypatch.setattr(module, "fused", lambda q, k, v, mask=None, kernel="", causal=True:
                        calls.append((mask is not None, causal)) or fused(q, k, v, mask, "", causal))
    cache, idx = KVCache(2, 30, 1, 2, 8, dtype=torch.float64), torch.zeros(2, 30, dtype=torch.long)
    fill(cache, *tensors(11), [5, 3, 1, 2], -1, idx)
    assert calls == [(False, True), (True, False), (False, False), (True, False)]


# ---------------------------------------------------------------- the cache

def fill(cache, q, k, v, splits, window, idx):
    "Run a sequence through layer 0 of a cache in chunks of these sizes; (B, H, T, D)."
    out, start = [], 0
    for size in splits:
        part = slice(start, start + size)
        cache.begin(idx[:, part])
        out.append(cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part], window))
        cache.end(size)
        start += size
    return torch.cat(out, 2)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(-1, 30), st.integers(1, 2))
def test_chunks_equal_the_whole(splits, window, K):
    T = sum(splits)
    q, k, v = tensors(T, 2 * K, K, 4)
    idx = torch.arange(2 * T).view(2, T)
    cache = KVCache(2, T + 3, 1, K, 4, dtype=torch.float64)
    y = fill(cache, q, k, v, splits, window, idx)
    torch.testing.assert_close(y, attention_naive(q, k, v, window), rtol=0, atol=1e-12)
    assert cache.lengths.tolist() == [T, T]
    assert torch.equal(cache.tokens[:, :T], idx)


@quick
@given(st.lists(st.integers(1, 12), min_size=2, max_size=4),
       st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(-1, 20), st.data())
def test_ragged_rows_equal_each_row_alone(prompts, chunks, window, data):
    "Padded prefill, then chunks and single tokens: each row as if it were the only one."
    B, longest, T = len(prompts), max(prompts), max(prompts) + sum(chunks)
    q, k, v = tensors(T, 4, 2, 4, B)
    idx = torch.randint(1, 1000, (B, T), generator=torch.Generator().manual_seed(T))
    cache = KVCache(B, T, 1, 2, 4, dtype=torch.float64)
    expected = [attention_naive(*(x[b:b + 1] for x in (q, k, v)), window)[0] for b in range(B)]
    prefill = fill(cache, q, k, v, [longest], window, idx)
    for b, length in enumerate(prompts):
        ours, theirs = prefill[b, :, :length], expected[b][:, :length]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cache.lengths.copy_(torch.tensor(prompts))
    if data.draw(st.booleans()):
        rows = data.draw(st.permutations(range(B)))         # the order of the rows does not matter
        cache = cache.select(torch.tensor(rows))
        q, k, v, idx = (x[rows] for x in (q, k, v, idx))
        prompts, expected = [prompts[b] for b in rows], [expected[b] for b in rows]
    for size in chunks:
        at = cache.lengths[:, None] + torch.arange(size)                                # (B, size)
        part = [x.gather(2, at[:, None, :, None].expand(-1, x.size(1), -1, 4)) for x in (q, k, v)]
        cache.begin(idx.gather(1, at))
        ids, exists = cache.previous_tokens()
        assert exists.all() and torch.equal(ids, idx.gather(1, at[:, :1] - 1))
        y = cache.attend(0, *part, window)
        cache.end(size)
        for b in range(B):
            torch.testing.assert_close(y[b], expected[b][:, at[b]], rtol=0, atol=1e-12)
    for b, length in enumerate(cache.lengths.tolist()):
        assert length == prompts[b] + sum(chunks)
        assert torch.equal(cache.tokens[b, :length], idx[b, :length])


def test_window_does_not_read_the_distant_past():
    "With NaN in all that no row may see, the result is still right: it was not read and masked."
    q, k, v = tensors(30, B=2)
    cache = KVCache(2, 30, 1, 2, 8, dtype=torch.float64)
    idx = torch.zeros(2, 30, dtype=torch.long)
    fill(cache, q, k, v, [25], 4, idx)
    cache.lengths.copy_(torch.tensor([25, 22]))
    cache.keys[:, :, :, :18], cache.values[:, :, :, :18] = torch.nan, torch.nan     # 22 − 4
    at = torch.tensor([25, 22])
    part = [torch.stack([x[b, :, at[b]:at[b] + 2] for b in range(2)]) for x in (q, k, v)]
    cache.begin(idx[:, :2])
    y = cache.attend(0, *part, 4)
    expected = attention_naive(q, k, v, 4)
    for b in range(2):
        torch.testing.assert_close(y[b], expected[b, :, at[b]:at[b] + 2], rtol=0, atol=1e-12)


def test_layers_with_different_windows_share_a_pass():
    q, k, v = tensors(12, B=2)
    cache = KVCache(2, 12, 4, 2, 8, dtype=torch.float64)
    idx = torch.zeros(2, 12, dtype=torch.long)
    windows = (3, -1, 3, 7)
    for part in (slice(0, 5), slice(5, 9), slice(9, 12)):
        cache.begin(idx[:, part])
        for layer, window in enumerate(windows):
            y = cache.attend(layer, q[:, :, part], k[:, :, part], v[:, :, part], window)
            expected = attention_naive(q, k, v, window)[:, :, part]
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        cache.end(part.stop - part.start)


def test_rows_of_one_length_share_a_mask():
    q, k, v = tensors(9, B=3)
    cache = KVCache(3, 9, 1, 2, 8, dtype=torch.float64)
    idx = torch.zeros(3, 9, dtype=torch.long)
    y = fill(cache, q, k, v, [5, 4], 3, idx)
    torch.testing.assert_close(y, attention_naive(q, k, v, 3), rtol=0, atol=1e-12)
    assert cache.masks[3].shape == (1, 1, 4, 7)             # 5 − 3 … 8 are read
    cache.lengths.copy_(torch.tensor([5, 4, 5]))
    cache.begin(idx[:, :4])
    cache.attend(0, q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], 3)
    assert cache.masks[3].shape == (3, 1, 4, 8)


def filled_cache(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(len(lengths), 10, 2, 1, 3)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    cache.tokens.random_(1, 1000, generator=generator)
    cache.lengths.copy_(torch.tensor(lengths))
    return cache


def row(cache, b):
    "All that a row remembers."
    n = int(cache.lengths[b])
    parts = cache.keys[:, b, :, :n], cache.values[:, b, :, :n], cache.tokens[b, :n]
    return n, *(part.tolist() for part in parts)


def test_rows_are_views():
    cache = filled_cache([5, 0, 3])
    before = [row(cache, b) for b in range(3)]
    view = cache.rows(1, 3)
    assert (view.batch_size, view.max_len) == (2, 10) and row(view, 1) == before[2]
    view.lengths.copy_(torch.tensor([2, 2]))
    q, k, v = tensors(4, 2, 1, 3, dtype=torch.float32)
    view.begin(torch.tensor([[7, 8, 9, 10], [1, 2, 3, 4]]))
    for layer in range(2):
        view.attend(layer, q, k, v)
    view.end(4)
    assert cache.lengths.tolist() == [5, 6, 6] and row(cache, 0) == before[0]
    assert cache.tokens[1, 2:6].tolist() == [7, 8, 9, 10]
    assert torch.equal(cache.keys[1, 2, :, 2:6], k[1])
    assert torch.equal(cache.values[0, 1, :, 2:6], v[0])


def test_copy_rows():
    cache = filled_cache([5, 2, 3, 7])
    before = [row(cache, b) for b in range(4)]
    cache.copy_rows(torch.tensor([0, 3]), torch.tensor([1, 0]))     # 0 is read before it is written
    assert [row(cache, b) for b in range(4)] == [before[b] for b in (3, 0, 2, 3)]
    cache.copy_rows(*torch.empty(2, 0, dtype=torch.long))
    assert [row(cache, b) for b in range(4)] == [before[b] for b in (3, 0, 2, 3)]


def test_select_copies():
    cache = filled_cache([5, 2, 3])
    before = [row(cache, b) for b in range(3)]
    chosen = cache.select(torch.tensor([2, 0, 2, 2]))
    assert [row(chosen, b) for b in range(4)] == [before[b] for b in (2, 0, 2, 2)]
    chosen.keys.zero_()
    chosen.lengths.zero_()
    assert [row(cache, b) for b in range(3)] == before


def test_previous_tokens_of_empty_rows():
    cache = filled_cache([0, 4])
    expected = cache.tokens[1, 3].item()
    cache.begin(torch.tensor([[5, 6], [7, 8]]))
    ids, exists = cache.previous_tokens()
    assert exists.tolist() == [[False], [True]] and ids.shape == (2, 1) and ids[1, 0] == expected


def test_cache_refuses_what_does_not_fit():
    cache = filled_cache([5, 2])
    with pytest.raises(UserError, match="holds 10 tokens, but 5 \\+ 6 are needed"):
        cache.begin(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(UserError, match="2 rows, but 3 came"):
        cache.begin(torch.zeros(3, 1, dtype=torch.long))
    cache.begin(torch.zeros(2, 5, dtype=torch.long))        # exactly full
