"""One set of numerics tests for fp32, bf16, fp16 and fp8, and the scaler that fp16 needs."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.precision import Linear, LossScaler, _check_fp8, fp8_matmul, to_fp8, use_fp8

# Half a unit in the last place of a number with m fraction bits is 2^-(m+1) of it.  Operands and
# result are rounded, which no single product survives with more than three such errors.
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "e4m3": 2.0**-4,
            "e5m2": 2.0**-3}
FORMATS = ["float32", "bfloat16", "float16", "fp8"]


def bounds(name: str) -> dict[str, float]:
    "Largest relative error of the output, of dx and of dW."
    if name == "fp8":   # one rounding per operand; dW is multiplied in the compute dtype
        return {"y": 2 * HALF_ULP["e4m3"], "dx": HALF_ULP["e4m3"] + HALF_ULP["e5m2"],
                "dw": 3 * HALF_ULP["bfloat16"]}
    c = 16 if name == "float32" else 3      # fp32 also sums in fp32
    return dict.fromkeys(("y", "dx", "dw"), c * HALF_ULP[name])


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def layer_and_errors(name, n_in, n_out, N, x_size=1.0, w_size=1.0, seed=0, change=lambda x: x):
    "A `Linear` in the given format, and its relative errors against fp64."
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(n_in, n_out)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) * w_size / n_in ** 0.5)
    if name == "fp8":
        assert use_fp8(layer, emulate=True) == 1
    dtype = torch.bfloat16 if name == "fp8" else getattr(torch, name)
    x, grad = (torch.randn(N, n, generator=generator) for n in (n_in, n_out))
    x = change(x * x_size).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad.to(dtype))
    assert y.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    y64 = x64 @ w64.T
    y64.backward(grad.to(dtype).double())
    return layer, {"y": relative(y, y64), "dx": relative(x.grad, x64.grad),
                   "dw": relative(layer.weight.grad, w64.grad)}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), N=st.integers(1, 33), odd=st.booleans(),
       seed=st.integers(0, 999))
def test_error_of_a_layer(name, n_in, n_out, N, odd, seed):
    "Any shape: the relative error of output and gradients is a few half units in the last place."
    if name == "fp8":
        n_in, n_out = 16 * (7 + n_in), 16 * (7 + n_out)
    elif odd:
        n_in, n_out = 2 * n_in + 1, 30 * n_out + 1
    _, errors = layer_and_errors(name, n_in, n_out, N, seed=seed)
    for part, bound in bounds(name).items():
        # a product of few numbers may cancel: its error is then large against the small result
        assert errors[part] < bound * (1 if min(n_in, n_out, N) > 16 else 30), (part, errors)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e4])
def test_magnitudes(name, size):
    "Tiny and large inputs are as exact as others, except where fp16 ends, at 6·10⁻⁵ and 65,504."
    _, errors = layer_and_errors(name, 256, 144, 40, x_size=size)
    if name == "float16" and size == 1e-6:
        assert errors.pop("y") > 10 * bounds(name)["y"]     # subnormal: few bits are left
        assert errors.pop("dw") > bounds(name)["dw"]
    if name == "float16" and size == 1e4:
        assert not math.isfinite(errors.pop("dw"))          # a sum of 40 such numbers is too large
    for part, error in errors.items():
        assert error < bounds(name)[part], (part, errors)


def test_fp16_ends_where_others_go_on():
    _, errors = layer_and_errors("float16", 256, 144, 40, x_size=1e4, w_size=1e3)
    assert not math.isfinite(errors["y"])
    for name in ("bfloat16", "fp8"):
        assert layer_and_errors(name, 256, 144, 40, 1e4, 1e3)[1]["y"] < bounds(name)["y"]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros(name):
    layer, _ = layer_and_errors(name, 128, 128, 8, change=torch.zeros_like)
    assert (layer.weight.grad == 0).all()


def test_one_outlier_costs_fp8_its_small_numbers():
    "One scale for the whole tensor: an outlier of 10⁴ leaves nothing of what is below its 10⁻⁷th."
    def outlier(x):
        return x.index_fill(0, torch.tensor([0]), 0).index_put((torch.tensor(0), torch.tensor(0)),
                                                               torch.tensor(1e6))
    _, calm = layer_and_errors("fp8", 256, 144, 40)
    _, wild = layer_and_errors("fp8", 256, 144, 40, change=outlier)
    assert calm["y"] < bounds("fp8")["y"] and wild["y"] < bounds("fp8")["y"]
    x8, scale = to_fp8(outlier(torch.randn(40, 256, generator=torch.Generator().manual_seed(1))))
    assert (x8.float()[1:] == 0).float().mean() > 0.3       # flushed, though the norm looks well


@settings(max_examples=100, deadline=None)
@given(exponent=st.integers(-60, 60), n=st.integers(1, 50), seed=st.integers(0, 999),
       dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
def test_round_to_fp8(exponent, n, seed, dtype):
    "The largest keeps its value; every other is off by at most half a unit, or half the smallest."
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x8, scale = to_fp8(x, dtype)
    back, half_ulp = x8.float() * scale, torch.finfo(dtype).eps / 2
    largest = x.abs().argmax()
    torch.testing.assert_close(back[largest], x[largest], rtol=1e-6, atol=0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * scale
    assert ((back - x).abs() <= (half_ulp * x.abs()).clamp(min=smallest / 2) * 1.001).all()
    assert x8.dtype == dtype and scale.dtype == torch.float32


def test_fp8_shows_what_is_not_finite():
    "A run that blew up must look so: the check for finite gradients comes later."
    for bad in (torch.inf, torch.nan):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            eye = to_fp8(torch.eye(16))
            assert not fp8_matmul(to_fp8(x, dtype), eye, torch.float32).isfinite().all()


def test_fp8_product_is_the_rounded_product():
    "Nothing is lost beyond the rounding of the operands."
    generator = torch.Generator().manual_seed(0)
    a, b = (to_fp8(torch.randn(n, 64, generator=generator)) for n in (48, 32))
    exact = (a[0].double() * a[1].double()) @ (b[0].double() * b[1].double()).T
    assert relative(fp8_matmul(a, b, torch.float32), exact) < 1e-6


def test_use_fp8():
    "Only large layers, only while gradients are recorded, and back."
    model = nn.ModuleDict({"up": Linear(128, 256), "small": Linear(128, 64), "odd": Linear(128, 200),
                           "plain": nn.Linear(128, 128), "lm_head": Linear(128, 512)})
    with pytest.raises(UserError, match="emulate=True"):
        use_fp8(model)
    assert use_fp8(model, emulate=True) == 1 and model["up"].fp8
    names = [name for name, layer in model.items() if getattr(layer, "fp8", False)]
    assert names == ["up"]
    x = torch.randn(3, 5, 128)
    rounded = model["up"](x)
    with torch.no_grad():
        exact = model["up"](x)
    assert rounded.shape == exact.shape == (3, 5, 256)
    assert 1e-3 < relative(rounded, exact) < bounds("fp8")["y"]
    assert use_fp8(model, on=False) == 0 and torch.equal(model["up"](x), exact)
    assert list(model["up"].state_dict()) == ["weight"]
    model["plain"] = Linear(128, 128)
    model["plain"].fp8 = model["lm_head"].fp8 = True         # on by other means: off as well
    use_fp8(model, on=False)
    assert not any(getattr(layer, "fp8", False) for layer in model.values())


@pytest.mark.parametrize("hip, capability", [("6.4", (9, 4)), (None, (8, 0))])
def test_fp8_refuses_other_gpus(hip, capability, monkeypatch):
    "AMD's capabilities have numbers of their own, and its fp8 formats other than ours."
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match="NVIDIA GPU of compute capability 8.9"):
        _check_fp8(torch.device("cuda"), emulate=True)


def test_small_gradients_survive_in_e5m2():
    "Rows of dy from 1 down to 2⁻²⁰, which e4m3 would flush from 2⁻¹⁹ on."
    layer = Linear(128, 128)
    use_fp8(layer, emulate=True)
    x = torch.randn(21, 128, requires_grad=True)
    layer(x).backward(2.0 ** -torch.arange(21.0)[:, None] * torch.ones(128))
    for row in (18, 19, 20):
        exact = 2.0**-row * layer.weight.detach().sum(0)
        assert relative(x.grad[row], exact) < 2 * HALF_ULP["e4m3"]


@pytest.mark.parametrize("x_learns, w_learns", [(True, False), (False, True)])
def test_fp8_makes_no_gradient_nobody_wants(x_learns, w_learns):
    layer = Linear(128, 128)
    use_fp8(layer, emulate=True)
    layer.weight.requires_grad_(w_learns)
    x = torch.randn(4, 128, requires_grad=x_learns)
    with torch.profiler.profile() as profile:
        layer(x).backward(torch.ones(4, 128))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_mm_v2"] == 1 + x_learns     # on a CPU each is an mm as well
    assert calls["aten::mm"] == 2                            # forward, and one of the two
    assert (x.grad is not None) == x_learns and (layer.weight.grad is not None) == w_learns


def test_fp8_of_nothing_and_of_a_view():
    "An empty batch stays empty; a transposed one comes out in rows, as the hardware asks."
    layer = Linear(128, 144)
    use_fp8(layer, emulate=True)
    x = torch.randn(0, 128, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (0, 144) and (layer.weight.grad == 0).all()
    assert to_fp8(torch.randn(32, 16).t())[0].is_contiguous()


def test_fp8_compiles():
    layer = Linear(128, 144)
    use_fp8(layer, emulate=True)
    x = torch.randn(7, 128, dtype=torch.bfloat16, requires_grad=True)
    eager = torch.autograd.grad(layer(x).float().square().sum(), (x, layer.weight))
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(compiled_layer(x).float().square().sum(), (x, layer.weight))
    assert all(relative(a, b) < 1e-2 for a, b in zip(compiled, eager))


# ---------------------------------------------------------------- the scaler

def test_scaler_halves_and_doubles():
    scaler = LossScaler(value=2.0**10, patience=3)
    values = []
    for found_inf in (True, False, False, True, False, False, False, False):
        scaler.update(found_inf)
        values.append(math.log2(scaler.value))
    assert values == [9, 9, 9, 8, 8, 8, 9, 9]
    assert scaler.scale(torch.tensor(3.0)) == 3 * 2.0**9
    scaler.good_steps = 7                             # a checkpoint from a run with more patience
    scaler.update(False)
    assert (scaler.value, scaler.good_steps) == (2.0**10, 0)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.integers(0, 59))
def test_scaler_resumes_exactly(steps, patience, stop):
    "Through JSON in the middle of a run: the same values as without a stop."
    straight, first = LossScaler(2.0**64, patience), LossScaler(2.0**64, patience)
    for found_inf in steps:
        straight.update(found_inf)
    for found_inf in steps[:stop]:
        first.update(found_inf)
    resumed = LossScaler()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found_inf in steps[stop:]:
        resumed.update(found_inf)
    assert resumed.state_dict() == straight.state_dict()


def test_scaler_gives_up():
    scaler = LossScaler(value=2.0)
    scaler.update(True)
    with pytest.raises(UserError, match="diverged"):
        scaler.update(True)


def train_toy(dtype, scaler, steps=60):
    "Two layers, gradients around 10⁻⁸; returns the losses and the share of zero gradients."
    generator = torch.Generator().manual_seed(0)
    up, down = Linear(16, 64), Linear(64, 1)
    with torch.no_grad():
        up.weight.normal_(0, 0.25, generator=generator)
        down.weight.normal_(0, 0.1, generator=generator)
    weights, losses, zeros = [up.weight, down.weight], [], []
    optimizer = torch.optim.Adam(weights, lr=0.01, eps=1e-20)
    x = torch.randn(256, 16, generator=generator)
    y = x[:, :1] * x[:, 1:2]
    for _ in range(steps):
        error = down(torch.relu(up(x.to(dtype)))).float() - y
        loss = 1e-7 * error.square().mean()           # as small as a term of a long sum may be
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        zeros.append(torch.cat([w.grad.flatten() == 0 for w in weights]).float().mean().item())
        for w in weights:
            w.grad /= scaler.value
        found_inf = not all(w.grad.isfinite().all() for w in weights)
        if not found_inf:
            optimizer.step()
        scaler.update(found_inf)
        losses.append(1e7 * loss.item())
    return losses, zeros


class NoScaler:
    value = 1.0

    def scale(self, loss):
        return loss

    def update(self, found_inf):
        pass


def test_scaler_saves_fp16():
    "Without it gradients are flushed to zero and nothing is learned; with it, as in fp32."
    exact, _ = train_toy(torch.float32, NoScaler())
    flushed, zeros = train_toy(torch.float16, NoScaler())
    assert min(zeros) == 1.0 and flushed[-1] == flushed[0]
    scaled, zeros = train_toy(torch.float16, LossScaler(value=2.0**16))
    assert max(zeros) < 0.6 and abs(scaled[-1] - exact[-1]) < 0.02 * exact[0]
    assert exact[-1] < 0.7 * exact[0]
    scaler = LossScaler(value=2.0**60)                # far too much: finds its way down
    recovered, _ = train_toy(torch.float16, scaler, steps=90)
    assert scaler.value < 2.0**50 and recovered[-1] < 0.7 * recovered[0]


# ---------------------------------------------------------------- a whole model

@pytest.fixture(scope="module")
def exact_losses():
    return train_gpt("float32")


@pytest.mark.parametrize("name", FORMATS[1:])
def test_small_gpt_learns_in_every_format(name, exact_losses):
    "15 steps on one batch, from ln V to almost nothing, in every format along nearly the same path."
    losses = train_gpt(name)
    assert abs(losses[0] - math.log(64)) < 1e-3 and losses[-1] < 0.05
    assert max(abs(a - b) for a, b in zip(losses, exact_losses)) < 0.05
    assert losses != exact_losses


def train_gpt(name, steps=15):
    "The losses of a few steps on one small batch."
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2,
                          n_embd=128)).init_weights(seed=0)
    model.compute_dtype = torch.bfloat16 if name == "fp8" else getattr(torch, name)
    if name == "fp8":
        assert use_fp8(model, emulate=True) == 12
    idx = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
    optimizer, scaler = setup_optimizer(model), LossScaler()
    losses = []
    for _ in range(steps):
        loss = model(idx[:, :-1], idx[:, 1:])
        if name == "float16":
            scaler.scale(loss).backward()
            norm = optimizer.step(loss_scale=scaler.value)
            scaler.update(not math.isfinite(norm))
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
