"""The loss in chunks against its textbook form: values, gradients, memory, compilers, bad input."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.loss import _chunk_gradient, head_loss, logits_of


def textbook(x, weight, targets, softcap):
    logits = x @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def data(N, C, V, dtype=torch.float64, seed=0, size=1.0):
    "Inputs, a head, targets of which some do not count, and a weight for each token's loss."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = size * torch.randn(V, C, generator=generator, dtype=torch.float64)
    weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    targets = torch.randint(-1, V, (N,), generator=generator)
    return x, weight, targets, torch.randn(N, generator=generator, dtype=torch.float64)


def loss_and_gradients(loss, x, weight):
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@settings(max_examples=60, deadline=None)
@given(N=st.integers(1, 40), C=st.integers(1, 9), V=st.integers(1, 50), chunk=st.integers(0, 45),
       softcap=st.sampled_from([0.0, 0.5, 15.0]), size=st.sampled_from([0.01, 1.0, 30.0]),
       reduction=st.sampled_from(["none", "sum"]), seed=st.integers(0, 999))
def test_equals_the_textbook(N, C, V, chunk, softcap, size, reduction, seed):
    "Any sizes, any weights per token, large and small logits: equal to 1e-12 in fp64."
    x, weight, targets, token_weights = data(N, C, V, seed=seed, size=size)
    want, ours = textbook(x, weight, targets, softcap), head_loss(x, weight, targets, softcap,
                                                                 chunk, reduction)
    if reduction == "none":
        torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)
        want, ours = ((losses * token_weights).sum() for losses in (want, ours))
    else:
        want, ours = 0.3 * want.sum(), 0.3 * ours
    for a, b in zip(loss_and_gradients(ours, x, weight), loss_and_gradients(want, x, weight)):
        torch.testing.assert_close(a, b, atol=1e-11 * size, rtol=1e-11)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2),
                                          (torch.float16, 2e-3)])
def test_error_of_each_dtype(dtype, bound, reduction):
    "Loss in fp32, gradients in the dtypes of their owners, all near the fp64 result."
    x, weight, targets, token_weights = data(48, 64, 300, dtype, size=0.3)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    losses = head_loss(x, weight, targets, 15.0, 10, reduction)
    assert losses.dtype == torch.float32
    weighted = (losses * token_weights.float()).sum() if reduction == "none" else losses
    exact_losses = textbook(*exact, targets, 15.0)
    exact_weighted = (exact_losses * token_weights if reduction == "none" else exact_losses).sum()
    ours = loss_and_gradients(weighted, x, weight)
    assert (ours[1].dtype, ours[2].dtype) == (dtype, torch.float32)
    for a, b in zip(ours[1:], loss_and_gradients(exact_weighted, *exact)[1:]):
        assert relative(a, b) < bound
    per_token = head_loss(x, weight, targets, 15.0, 10)
    assert (per_token - exact_losses).abs().max() < 10 * bound


def test_many_chunks_add_up_in_fp32():
    "256 products in bf16 are summed in fp32: the head's gradient is no worse than in one chunk."
    x, weight, targets, _ = data(2048, 16, 40, torch.bfloat16, size=0.3)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want, = torch.autograd.grad(textbook(*exact, targets, 15.0).sum(), exact[1])
    errors = [relative(torch.autograd.grad(head_loss(x, weight, targets, 15.0, chunk, "sum"),
                                           weight)[0], want) for chunk in (8, 2048)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_chunk_is_fp32_after_the_product(softcap):
    "Soft cap and log-sum-exp of a bf16 chunk add no rounding of their own."
    x, weight, targets, token_weights = data(48, 64, 300, torch.bfloat16)
    want = F.cross_entropy(logits_of(x, weight, softcap), targets, ignore_index=-1,
                           reduction="none")
    losses, _ = _chunk_gradient(x, weight.bfloat16(), targets, token_weights.float(), softcap)
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_no_target_counts(chunk, reduction):
    "A batch that is all padding costs nothing and moves nothing, even from huge logits."
    x, weight, _, _ = data(10, 4, 7, torch.float32, size=1e4)
    loss = head_loss(x, weight, torch.full((10,), -1), 0.0, chunk, reduction).sum()
    values = loss_and_gradients(loss, x, weight)
    assert all((value == 0).all() for value in values)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("only", ["x", "weight"])
def test_one_gradient_only(only, reduction):
    x, weight, targets, _ = data(11, 4, 9)
    want = dict(zip(("x", "weight"), torch.autograd.grad(textbook(x, weight, targets, 3.0).sum(),
                                                        (x, weight))))
    tensors = {"x": x.detach(), "weight": weight.detach()}
    tensors[only].requires_grad_()
    head_loss(tensors["x"], tensors["weight"], targets, 3.0, 4, reduction).sum().backward()
    torch.testing.assert_close(tensors[only].grad, want[only], atol=1e-12, rtol=1e-12)
    assert all(t.grad is None for name, t in tensors.items() if name != only)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_without_gradients(context):
    x, weight, targets, _ = data(11, 4, 9)
    with context():
        for reduction in ("none", "sum"):
            loss = head_loss(x, weight, targets, 3.0, 4, reduction)
            assert not loss.requires_grad
            torch.testing.assert_close(loss.sum(), textbook(x, weight, targets, 3.0).sum())


@pytest.mark.parametrize("chunk", [0, 4])
def test_no_tokens(chunk):
    x, weight, targets, _ = data(0, 4, 9)
    assert head_loss(x, weight, targets, 3.0, chunk).shape == (0,)
    assert head_loss(x, weight, targets, 3.0, chunk, "sum") == 0


def test_gradients_add_up():
    "Two backward passes into .grad, as gradient accumulation does; a graph may be used twice."
    x, weight, targets, _ = data(11, 4, 9)
    loss = head_loss(x, weight, targets, 3.0, 4, "sum")
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_second_derivative(reduction):
    "A gradient that is differentiated again would be taken for a constant: refused instead."
    x, weight, targets, _ = data(11, 4, 9)
    loss = head_loss(x, weight, targets, 3.0, 4, reduction).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
    whole = head_loss(x, weight, targets, 3.0, 0, reduction).sum()
    gradient, = torch.autograd.grad(whole, x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().max() > 0


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_never_holds_more_than_a_chunk_of_logits(reduction):
    "The peak of all that is alive, forward and backward; not only the largest single tensor."
    N, C, V, chunk = 512, 4, 1000, 16
    x, weight, targets, _ = data(N, C, V, torch.float32)
    peaks = {}
    for chunk_tokens in (0, chunk):
        with torch.profiler.profile(profile_memory=True) as profile:
            head_loss(x, weight, targets, 15.0, chunk_tokens, reduction).sum().backward()
        alive = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        peaks[chunk_tokens] = peak
    logits = 4 * N * V
    assert peaks[0] > 2 * logits                       # what is measured can see them
    assert peaks[chunk] < 6 * 4 * chunk * V            # a few buffers of one chunk, dw, dx
    assert peaks[chunk] < 0.2 * logits


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_inside_a_compiled_model(reduction):
    "fullgraph: nothing of it falls back to Python; equal to the eager result."
    layer = torch.nn.Linear(16, 16)
    head = torch.nn.Parameter(torch.randn(50, 16))
    idx, targets = torch.randn(2, 9, 16), torch.randint(-1, 50, (2, 9))

    def loss_of(x):
        hidden = torch.tanh(layer(x)).flatten(0, 1)
        return head_loss(hidden, head, targets.flatten(), 15.0, 8, reduction).sum()

    parameters = [*layer.parameters(), head]
    want = torch.autograd.grad(loss_of(idx), parameters)
    compiled = torch.compile(loss_of, fullgraph=True)
    ours = torch.autograd.grad(compiled(idx), parameters)
    for a, b in zip(ours, want):
        assert relative(a, b) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(compiled(idx), loss_of(idx))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("bad", [9, 200, -2])
def test_vocabulary_mismatch(bad, chunk):
    x, weight, targets, _ = data(11, 4, 9)
    targets[7] = bad
    with pytest.raises(UserError, match=f"target {bad} .* 0 … 8"):
        head_loss(x, weight, targets, 3.0, chunk)


@pytest.mark.parametrize("bad", [-100, -2, 9])
def test_bad_target_inside_a_chunk(bad):
    "Where nobody looked at the targets, as on a GPU, an id out of range is still an error."
    x, weight, targets, token_weights = data(11, 4, 9)
    targets[7] = bad
    with pytest.raises(RuntimeError, match="out of bounds"):
        _chunk_gradient(x.detach(), weight.detach(), targets, token_weights, 3.0)


@pytest.mark.parametrize("shape, n_targets, chunk", [((2, 6, 4), 12, 0), ((2, 6, 4), 2, 4),
                                                     ((11, 4), 10, 4), ((11, 4), 12, 0),
                                                     ((11, 4), 11, -1)])
def test_wrong_shapes(shape, n_targets, chunk):
    with pytest.raises(UserError, match=r"expected x \(N, C\), targets \(N,\) and chunk_tokens"):
        head_loss(torch.randn(shape), torch.randn(9, 4), torch.zeros(n_targets, dtype=torch.long),
                  3.0, chunk)


def test_logits():
    x, weight, targets, _ = data(6, 4, 9, torch.bfloat16)
    logits = logits_of(x.view(2, 3, 4), weight, 5.0)
    assert logits.shape == (2, 3, 9) and logits.dtype == torch.float32 and logits.abs().max() <= 5
    again = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(again, head_loss(x, weight, targets, 5.0, 4))
    with pytest.raises(UserError, match="neither 'none' nor 'sum'"):
        head_loss(x, weight, targets, reduction="mean")
