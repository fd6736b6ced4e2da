"""The optimizer against PyTorch's and naive computation; the same step on many processes."""
import gc
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import (DEFAULTS, NEWTON_SCHULZ, POLAR_EXPRESS, MuonAdamW, adamw_update,
                                   best_quintic, deal, equalize, lr_schedule, make_bundles,
                                   momentum_schedule, muon_update, orthogonalize,
                                   polar_express, setup_optimizer)
from nanochat_nb.pretraining import train_step

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Toy(nn.Module):
    "Tables, five matrices of one shape, two others, vectors, and a matrix that is never used."

    def __init__(self, dtype):
        super().__init__()
        self.wte = nn.Embedding(17, 8)
        self.square = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(5)])
        self.up = nn.Parameter(torch.randn(8, 12) / 3)
        self.down = nn.Parameter(torch.randn(12, 8) / 3)
        self.gain = nn.Parameter(torch.ones(8))
        self.scale = nn.Parameter(torch.ones(()))  # no dimension at all
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.lm_head = nn.Parameter(torch.randn(18, 8) / 3)
        self.to(dtype)

    def forward(self, idx, targets, use_rare):
        x = self.wte(idx)
        for matrix in self.square:
            x = x + torch.tanh(x @ matrix)
        if use_rare:  # in some micro-batches only: its gradient is None on some ranks
            x = x + torch.relu(x @ self.up) @ self.down
        logits = (x * self.gain * self.scale) @ self.lm_head.T
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def toy_optimizer(model, rank=0, world_size=1):
    adamw = {"wte.weight", "lm_head", "gain", "scale"}
    named = list(model.named_parameters())
    return MuonAdamW([
        {"kind": "adamw", "params": [(n, p) for n, p in named if n in adamw], "lr": 0.01,
         "weight_decay": 0.1},
        {"kind": "muon", "params": [(n, p) for n, p in named if n not in adamw], "lr": 0.02,
         "weight_decay": 0.1, "cautious": True}], rank, world_size)


def backward(model, step, rank=0, world_size=1, loss_scale=1.0):
    "A step's global batch is 6 micro-batches of unequal numbers of tokens, dealt to the ranks."
    generator = torch.Generator().manual_seed(step)
    batch = [torch.randint(17, (2, 3 + i), generator=generator) for i in range(6)]
    tokens = sum(b.size(1) for b in batch)
    for i, (idx, targets) in enumerate(batch):
        if i % world_size == rank:
            (model(idx, targets, use_rare=i == 0) / tokens * loss_scale).backward()


def train(model, optimizer, steps, max_norm=None, loss_scale=1.0):
    for step in steps:
        backward(model, step, optimizer.rank, optimizer.world_size, loss_scale)
        optimizer.step(lr_schedule(step, 6), momentum_schedule(step, 6), max_norm, loss_scale)


def run(rank, world_size, dtype, folder):
    "6 steps straight, and 3 steps from what two ranks saved half way; stores the weights."
    for max_norm in (None, 0.5):
        torch.manual_seed(0)
        model = Toy(dtype)
        optimizer = toy_optimizer(model, rank, world_size)
        train(model, optimizer, range(3), max_norm)
        name = f"{str(dtype)[6:]}-{max_norm}"
        if world_size == 2:
            save_file(optimizer.state_dict(), folder / f"{name}-optimizer-{rank}.safetensors")
            if rank == 0:
                save_file(model.state_dict(), folder / f"{name}-half.safetensors")
            dist.barrier()
        train(model, optimizer, range(3, 6), max_norm)

        torch.manual_seed(1)
        resumed = Toy(dtype)
        resumed.load_state_dict(load_file(folder / f"{name}-half.safetensors"))
        second = toy_optimizer(resumed, rank, world_size)
        second.load_state_dict(load_file(folder / f"{name}-optimizer-0.safetensors")
                               | load_file(folder / f"{name}-optimizer-1.safetensors"))
        train(resumed, second, range(3, 6), max_norm)
        for kind, result in (("straight", model), ("resumed", resumed)):
            save_file(result.state_dict(),
                      folder / f"{name}-{kind}-{world_size}-{rank}.safetensors")


def run_scaled(rank, world_size, folder):
    "As `run` without clipping, the loss 1024 times as large; one step meets inf on the last rank."
    torch.manual_seed(0)
    model = Toy(torch.float64)
    optimizer = toy_optimizer(model, rank, world_size)
    train(model, optimizer, range(3), loss_scale=1024.0)
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.state_dict()).items()}
    backward(model, 99, rank, world_size)
    if rank == world_size - 1:
        model.gain.grad = torch.ones_like(model.gain)
        model.gain.grad[1] = math.inf
    assert not torch.isfinite(optimizer.step(loss_scale=1024.0))
    optimizer.zero_grad()
    assert all(torch.equal(before[k], v)
               for k, v in (model.state_dict() | optimizer.state_dict()).items())
    train(model, optimizer, range(3, 6), loss_scale=1024.0)
    save_file(model.state_dict(), folder / f"float64-None-scaled-{world_size}-{rank}.safetensors")


def small_gpt(dtype):
    "No weight is zero, so that relative differences mean something."
    model = GPT(GPTConfig(sequence_len=12, vocab_size=30, n_layer=2, n_head=2, n_kv_head=1,
                          n_embd=16)).init_weights(seed=0).to(dtype)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1, generator=generator)
    return model


# ranks → rows in a micro-batch; each cut deals the same 12 rows
CUTS = {1: (1, 2, 3, 12), 2: (1, 2, 3, 6), 3: (1, 2, 4), 5: (1, 2), 7: (1,)}
CASES = [(dtype, world_size, size) for dtype in TOLERANCE for world_size in CUTS
         for size in CUTS[world_size] if dtype == torch.float64 or world_size < 5]


def twelve_rows(step):
    "Inputs and targets, (12, 12) each; rows of 0, 5, 10, 2, 7, 12, 4, 9, 1, 6, 11, 3 targets."
    idx = torch.randint(30, (12, 13), generator=torch.Generator().manual_seed(step))
    unused = torch.arange(12) >= (5 * torch.arange(12) % 13)[:, None]
    return idx[:, :-1], idx[:, 1:].masked_fill(unused, -1)


def run_train_step(rank, world_size, dtype, folder):
    "Two steps of the real training step for each cut of the batch."
    for size in CUTS[world_size]:
        model = small_gpt(dtype)
        optimizer = setup_optimizer(model, rank=rank, world_size=world_size)
        numbers = []
        for step in range(2):
            micro_batches = list(zip(*(part.split(size) for part in twelve_rows(step))))
            numbers += train_step(model, optimizer, micro_batches[rank::world_size])
        result = {"losses": torch.tensor(numbers[::2], dtype=torch.float64),  # summed in fp32
                  "norms": torch.tensor(numbers[1::2], dtype=torch.float64)}
        save_file(model.state_dict() | result,
                  folder / f"train_step-{dtype}-{world_size}-{size}-{rank}.safetensors")


def worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world_size}", rank=rank,
                            world_size=world_size)
    calls = record_collectives()
    for dtype in TOLERANCE if world_size < 5 else [torch.float64]:
        run(rank, world_size, dtype, folder)
    run_scaled(rank, world_size, folder)
    for dtype in TOLERANCE if world_size < 5 else [torch.float64]:
        run_train_step(rank, world_size, dtype, folder)
    (folder / f"calls-{world_size}-{rank}").write_text("\n".join(calls))
    dist.destroy_process_group()
    gc.collect()


def record_collectives() -> list[str]:
    "From now on, the collectives this process starts and what they carry."
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            tensors = [(tuple(a.shape), str(a.dtype)) for a in args if torch.is_tensor(a)]
            calls.append(f"{name} {tensors}")
            return function(*args, **kwargs)
        return call

    for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor",
                 "all_gather_single", "all_gather_into_tensor", "broadcast", "reduce", "barrier"):
        if function := getattr(dist, name, None):
            setattr(dist, name, recorded(name, function))
    return calls


def start_ranks(function, world_size, *args):
    "`function(rank, world_size, *args)` in as many processes, which import torch once, together."
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["nanochat_nb.pretraining", "hypothesis", "pytest"])
        method = "forkserver"
    mp.start_processes(function, (world_size, *args), world_size, start_method=method)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Weights after 6 steps on 1, 2, 3, 5 and 7 ranks, straight and resumed."
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (2, 3, 5, 7):
        start_ranks(worker, world_size, folder)
    for dtype in TOLERANCE:
        run(0, 1, dtype, folder)
        run_train_step(0, 1, dtype, folder)
    run_scaled(0, 1, folder)
    return folder


def distance(a, b):
    "‖a − b‖ / ‖b‖ of the worst tensor."
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in b)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ranks_agree(results, dtype, max_norm):
    name = f"{str(dtype)[6:]}-{max_norm}"
    expected = load_file(results / f"{name}-straight-1-0.safetensors")
    for world_size in (1, 2, 3) if dtype == torch.float32 else (1, 2, 3, 5, 7):
        for kind in ("straight", "resumed"):
            ranks = [load_file(results / f"{name}-{kind}-{world_size}-{rank}.safetensors")
                     for rank in range(world_size)]
            assert distance(ranks[0], expected) <= TOLERANCE[dtype], (kind, world_size)
            assert all(torch.equal(r[k], ranks[0][k]) for r in ranks for k in expected), \
                "ranks hold different weights"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_loss_scale_cancels(results, world_size):
    "Also says that a step that met inf on one rank has changed nothing on any (see `run_scaled`)."
    expected = load_file(results / "float64-None-straight-1-0.safetensors")
    scaled = load_file(results / f"float64-None-scaled-{world_size}-0.safetensors")
    assert distance(scaled, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype, world_size, size", CASES)
def test_update_does_not_depend_on_how_the_batch_is_split(results, dtype, world_size, size):
    "Micro-batches of `size` rows, dealt to the ranks, against one rank that takes row by row."
    expected = load_file(results / f"train_step-{dtype}-1-1-0.safetensors")
    start = small_gpt(dtype).state_dict()
    assert all(not torch.equal(expected[k], start[k]) for k in start), "nothing was trained"
    for rank in range(world_size):
        cut = load_file(results / f"train_step-{dtype}-{world_size}-{size}-{rank}.safetensors")
        losses = cut.pop("losses")
        reference = {k: v for k, v in expected.items() if k != "losses"}
        assert distance(cut, reference) <= TOLERANCE[dtype], f"rank {rank}"
        torch.testing.assert_close(losses, expected["losses"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])
def test_all_ranks_issue_the_same_collectives(results, world_size):
    "In another order they would wait for each other for ever on a GPU; in this one they cannot."
    calls = [(results / f"calls-{world_size}-{rank}").read_text() for rank in range(world_size)]
    assert len(set(calls)) == 1
    assert "reduce_scatter" in calls[0] and "all_gather" in calls[0]


def test_clipping_changed_something(results):
    free, clipped = (load_file(results / f"float64-{max_norm}-straight-1-0.safetensors")
                     for max_norm in (None, 0.5))
    assert distance(free, clipped) > 1e-3


def test_state_is_spread(results):
    parts = [load_file(results / f"float32-None-optimizer-{rank}.safetensors") for rank in (0, 1)]
    assert not set(parts[0]) & set(parts[1])
    sizes = [sum(t.numel() for t in part.values()) for part in parts]
    whole = sum(t.numel() for t in toy_optimizer(Toy(torch.float32)).state_dict().values())
    assert sum(sizes) == whole
    assert max(sizes) < 0.6 * whole


# ----------------------------------------------------------------------------- who owns what


@given(length=st.integers(0, 40), world_size=st.integers(1, 9), first=st.integers(0, 8))
def test_deal(length, world_size, first):
    first %= world_size
    bounds = deal(length, world_size, first)
    runs = [b - a for a, b in zip(bounds, bounds[1:])]
    assert len(runs) == world_size and sum(runs) == length and bounds[0] == 0
    assert max(runs) - min(runs) <= 1
    if length % world_size:
        assert runs[first] == max(runs)


def test_stacks_of_a_deep_model_are_dealt_evenly():
    "Depth 20 on eight ranks: 80 square matrices, 20 + 20 that cost four times as much."
    def muon(shape, count, what):
        return [(f"{what}{i}", nn.Parameter(torch.empty(shape))) for i in range(count)]
    params = muon((4, 4), 80, "square") + muon((16, 4), 20, "up") + muon((4, 16), 20, "down")
    group = {**DEFAULTS["muon"], "kind": "muon", "params": params, "lr": 0.1}
    costs = [sum(b.count * b.params[0].numel() for b in make_bundles([group], rank, 8)) // 16
             for rank in range(8)]
    assert costs == [30] * 8


def test_stacks_are_limited(monkeypatch):
    import nanochat_nb.optimizer as module
    monkeypatch.setattr(module, "MAX_STACK", 3 * 16)
    params = [(str(i), nn.Parameter(torch.randn(4, 4))) for i in range(7)]
    group = {**DEFAULTS["muon"], "kind": "muon", "params": params, "lr": 0.1}
    assert [len(b.params) for b in make_bundles([group])] == [3, 3, 1]
    assert [len(b.params) for b in make_bundles([group], 0, 2)] == [2, 2, 2, 1]


class Shapes(nn.Module):
    def __init__(self, rows, matrices):
        super().__init__()
        self.wte = nn.Embedding(rows, 3)
        self.scale = nn.Parameter(torch.zeros(()))
        self.square = nn.ParameterList([torch.zeros(4, 2) for _ in range(matrices)])


def shapes_optimizers(rows, matrices, world_size):
    "One optimizer per rank; to build and to load them needs no process group."
    model = Shapes(rows, matrices)
    named = list(model.named_parameters())
    return [MuonAdamW([{"kind": "adamw", "params": named[:1] + named[1:2], "lr": 0.1},
                       {"kind": "muon", "params": named[2:], "lr": 0.1}], rank, world_size)
            for rank in range(world_size)]


def union(optimizers):
    return {key: tensor for optimizer in optimizers
            for key, tensor in optimizer.state_dict().items()}


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), matrices=st.integers(0, 6), saved_by=st.integers(1, 7),
       loaded_by=st.integers(1, 7))
def test_state_goes_through_any_number_of_ranks(rows, matrices, saved_by, loaded_by):
    whole, = shapes_optimizers(rows, matrices, 1)
    for i, tensor in enumerate(union([whole]).values()):
        tensor.copy_(100 * i + torch.arange(tensor.numel()).view(tensor.shape))
    for world_size in (saved_by, loaded_by, 1):
        state = union([whole]) if world_size == saved_by else state  # noqa: F821
        ranks = shapes_optimizers(rows, matrices, world_size)
        for optimizer in ranks:
            optimizer.load_state_dict(state)
        state = union(ranks)
        assert sum(t.numel() for t in state.values()) == sum(
            t.numel() for r in ranks for t in r.state_dict().values()), "parts overlap"
    assert set(state) == set(union([whole]))
    assert all(torch.equal(state[k], v) for k, v in union([whole]).items())


def test_loads_what_an_older_release_saved():
    "Whole tensors by `name|key`, one owner for each, no second moment of NorMuon."
    torch.manual_seed(0)
    old = {"wte.weight|exp_avg": torch.randn(9, 3), "wte.weight|exp_avg_sq": torch.rand(9, 3),
           "wte.weight|step": torch.tensor(7), "scale|exp_avg": torch.randn(()),
           "scale|exp_avg_sq": torch.rand(()), "scale|step": torch.tensor(7),
           "square.0|momentum": torch.randn(4, 2), "square.1|momentum": torch.randn(4, 2)}
    for world_size in (1, 2, 3):
        ranks = shapes_optimizers(9, 2, world_size)
        for optimizer in ranks:
            optimizer.load_state_dict(old)
        back, = shapes_optimizers(9, 2, 1)
        back.load_state_dict(union(ranks))
        assert all(torch.equal(back.state_dict()[k], v) for k, v in old.items())
        assert back.state_dict()["square.0|second_moment"].abs().sum() == 0


def test_state_refuses_what_does_not_fit():
    def optimizer(rows=5, columns=3):
        table, matrix = nn.Parameter(torch.zeros(rows, columns)), nn.Parameter(torch.zeros(2, 2))
        return MuonAdamW([{"kind": "adamw", "params": [("t", table)], "lr": 0.1},
                          {"kind": "muon", "params": [("m", matrix)], "lr": 0.1}])
    good = optimizer().state_dict()
    with pytest.raises(UserError, match="no 't.exp_avg'.*fresh optimizer"):
        optimizer().load_state_dict({})
    for other in (optimizer(4), optimizer(6), optimizer(5, 4)):
        with pytest.raises(UserError, match="shape|complete"):
            optimizer().load_state_dict(other.state_dict())
    half = {k: v for k, v in good.items() if k != "t|exp_avg"}
    half |= {"t|exp_avg|rows 0:2": torch.ones(2, 3), "t|exp_avg|rows 3:5": torch.ones(2, 3)}
    taker = optimizer()
    with pytest.raises(UserError, match="not complete.*rows up to 2"):
        taker.load_state_dict(half)
    assert all(v.abs().sum() == 0 for v in taker.state_dict().values()), "changed before the check"
    taker.load_state_dict(half | {"t|exp_avg|rows 2:3": torch.ones(1, 3)})
    assert taker.state_dict()["t|exp_avg"].sum() == 15


# ----------------------------------------------------------------------------- one process


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_equals_torch(dtype):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5, 7, dtype=dtype)) for _ in range(2))
    settings = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    reference = torch.optim.AdamW([theirs], lr=0.01, **settings)
    optimizer = MuonAdamW([{"kind": "adamw", "params": [("w", ours)], "lr": 0.02, **settings}])
    for _ in range(10):
        grad = torch.randn(5, 7, dtype=dtype)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step(lr_multiplier=0.5)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_equals_torch(shape):
    "torch.optim.Muon always multiplies in bf16; with the same dtype the rules are the same."
    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(3)]
    ours = [nn.Parameter(w.clone()) for w in weights]
    theirs = [nn.Parameter(w.clone()) for w in weights]
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    named = [(str(i), p) for i, p in enumerate(ours)]
    optimizer = MuonAdamW([{"kind": "muon", "params": named, "lr": 0.02, "weight_decay": 0.1,
                            "ns_dtype": torch.bfloat16, "polynomials": NEWTON_SCHULZ,
                            "beta2": 0.0}])
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b, w in zip(ours, theirs, weights):
        assert (a - b).norm() / (b - w).norm() < 1e-3  # measured: 0


@pytest.mark.parametrize("polynomials", [NEWTON_SCHULZ, POLAR_EXPRESS, POLAR_EXPRESS[:2]])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 33), (33, 5), (1, 9)])
def test_orthogonalize(shape, polynomials):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    result = orthogonalize(matrices, polynomials)
    # the rule acts on singular values only: same singular vectors, new values by the polynomial
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(result, u @ s.diag_embed() @ vh, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalize(matrices[1], polynomials), result[1], rtol=0,
                               atol=1e-12)
    assert orthogonalize(torch.zeros(4, 4), polynomials).abs().sum() == 0


@settings(max_examples=25, deadline=None)
@given(lower=st.floats(1e-3, 0.5), upper=st.floats(0.8, 2.0), seed=st.integers(0, 999))
def test_no_other_quintic_is_better(lower, upper, seed):
    "The worst error over the interval cannot be made smaller by moving the coefficients."
    s = torch.linspace(lower, upper, 4001, dtype=torch.float64)
    powers = torch.stack([s, s**3, s**5])
    best = torch.tensor(best_quintic(lower, upper), dtype=torch.float64)
    error = (1 - best @ powers).abs().max()
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    moves *= 10 ** torch.empty(200, 1, dtype=torch.float64).uniform_(-4, 0, generator=generator)
    others = (1 - (best + moves) @ powers).abs().amax(dim=1)
    assert error < 1 and others.min() >= error - 1e-6


def test_polar_express():
    torch.testing.assert_close(torch.tensor(polar_express(5)), torch.tensor(POLAR_EXPRESS),
                               rtol=0, atol=1e-6)
    # without safety and from a narrow interval it ends as Newton's own quintic (15, −10, 3) / 8
    assert polar_express(5, lower=0.1, safety=1.0)[-1] == pytest.approx(
        (1.875, -1.25, 0.375), abs=1e-6)
    s = torch.logspace(-3, 0, 999, dtype=torch.float64)
    spread = {}
    for name, polynomials in {"newton": NEWTON_SCHULZ, "polar": POLAR_EXPRESS}.items():
        value = s
        for a, b, c in polynomials:
            value = a * value + b * value**3 + c * value**5
        spread[name] = (value - 1).abs().max().item()
    assert spread["polar"] < 0.13 < 0.5 < spread["newton"]


def spectrum(values, rows, columns):
    "A matrix with these singular values and random singular vectors."
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))[0]
    return u @ torch.diag(values) @ v.T


@pytest.mark.parametrize("values", [torch.ones(64), torch.logspace(0, -3, 64),
                                    torch.cat([torch.ones(1), torch.full((63,), 1e-3)])])
def test_bf16_products_stay_in_bounds(values):
    "Rounding may push a value out of its interval; the safety factor keeps it from running away."
    torch.manual_seed(0)
    matrix = spectrum(values.double(), 64, 128)
    exact = orthogonalize(matrix)
    rounded = orthogonalize(matrix.float(), dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.linalg.svdvals(rounded.double()).max() < 1.15
    assert (rounded.double() - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_normuon_equals_the_naive_rule(shape):
    "Each row (column, if wide) divided by its root mean square over time; the norm put back."
    torch.manual_seed(0)
    tall = shape[0] >= shape[1]
    second_moment = torch.zeros(2, shape[0], 1) if tall else torch.zeros(2, 1, shape[1])
    mean_squares = torch.zeros(2, shape[0] if tall else shape[1])
    for _ in range(4):
        updates = torch.randn(2, *shape) * torch.logspace(0, -2, shape[1])
        result = equalize(updates.clone(), second_moment, beta2=0.7)
        for k, update in enumerate(updates):
            lines = update if tall else update.T
            expected = torch.zeros_like(lines)
            for i, line in enumerate(lines):
                mean_squares[k, i] = 0.7 * mean_squares[k, i] + 0.3 * (line**2).sum() / len(line)
                expected[i] = line / mean_squares[k, i].sqrt()
            expected = (expected if tall else expected.T) * update.norm() / expected.norm()
            torch.testing.assert_close(result[k], expected, rtol=1e-5, atol=1e-6)
    assert equalize(torch.zeros(2, *shape), torch.zeros_like(second_moment)).abs().sum() == 0


@pytest.mark.parametrize("setting", [{"polynomials": NEWTON_SCHULZ}, {"beta2": 0.0}, {"beta2": 0.5},
                                     {"cautious": True}, {"weight_decay": 0.0},
                                     {"ns_dtype": torch.bfloat16}])
def test_every_muon_setting_reaches_the_update(setting):
    "And does what `muon_update` does with it."
    torch.manual_seed(0)
    start, grads = torch.randn(5, 3), torch.randn(3, 5, 3)
    group = {"weight_decay": 0.5, **setting}

    def trained(group):
        p = nn.Parameter(start.clone())
        optimizer = MuonAdamW([{"kind": "muon", "params": [("m", p)], "lr": 0.1, **group}])
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        return p.detach()

    momentum, expected = torch.zeros(1, 5, 3), start.clone()
    arguments = {"polynomials": POLAR_EXPRESS, "beta2": 0.9, **group}
    second = torch.zeros(1, 5, 1) if arguments["beta2"] else None
    for grad in grads:
        muon_update([expected], grad[None], momentum, 0.1, second_moment=second, **arguments)
    assert torch.equal(trained(group), expected)
    assert not torch.equal(trained({"weight_decay": 0.5}), expected)


def test_cautious_decay_only_shrinks_with_the_update():
    w = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    grad = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    free, cautious = w.clone(), w.clone()
    muon_update([free], grad[None], torch.zeros(1, 2, 2, dtype=torch.float64), 0.1)
    muon_update([cautious], grad[None], torch.zeros(1, 2, 2, dtype=torch.float64), 0.1,
                weight_decay=0.5, cautious=True)
    change = cautious - free
    assert change[0, 0] == pytest.approx(-0.05)  # both want it smaller
    assert change[1, 1] == 0                     # the update makes it larger: no decay


def test_no_gradient_is_a_zero_gradient():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizers = [MuonAdamW([{"kind": "adamw", "params": [("w", w)], "lr": 0.1}]) for w in (p, q)]
    for gradient in (torch.ones(3), None):
        p.grad = gradient
        q.grad = torch.zeros(3) if gradient is None else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(p, q) and not torch.equal(p, torch.ones(3))


def test_not_finite_norm_changes_nothing():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    optimizer = MuonAdamW([{"kind": "muon", "params": [("m", p)], "lr": 0.1},
                           {"kind": "adamw", "params": [("v", q)], "lr": 0.1}])
    p.grad, q.grad = torch.ones(2, 2), torch.tensor([1.0, math.nan, 1.0])
    before = {k: v.clone() for k, v in optimizer.state_dict().items()}
    assert not torch.isfinite(optimizer.step(max_norm=1.0))
    assert torch.equal(p, torch.ones(2, 2)) and torch.equal(q, torch.ones(3))
    assert all(torch.equal(before[k], v) for k, v in optimizer.state_dict().items())


def test_clipping_equals_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.ones(n, 3)) for n in (1, 4)]
    theirs = [nn.Parameter(torch.ones(n, 3)) for n in (1, 4)]
    optimizer = MuonAdamW([{"kind": "adamw", "lr": 0.1, "eps": 1e-2,       # so that sizes matter
                            "params": [("a", ours[0]), ("b", ours[1])]}])
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.0)
    for max_norm in (1.0, 1e9):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(a) * 10
            a.grad = b.grad.clone()
        torch.testing.assert_close(optimizer.step(max_norm=max_norm),
                                   nn.utils.clip_grad_norm_(theirs, max_norm))
        reference.step()
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(UserError, match="above 0"):
        optimizer.step(max_norm=0.0)


def test_bad_groups():
    vector = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"kind": "muon", "params": [("v", vector)], "lr": 0.1}])
    with pytest.raises(ValueError, match="no setting beta"):
        MuonAdamW([{"kind": "adamw", "params": [("v", vector)], "lr": 0.1, "beta": 0.9}])
    with pytest.raises(ValueError, match="not one of"):
        MuonAdamW([{"kind": "sgd", "params": [("v", vector)], "lr": 0.1}])
    with pytest.raises(ValueError, match="two groups"):
        MuonAdamW([{"kind": "adamw", "params": [("v", vector)], "lr": 0.1}] * 2)


def test_weights_in_half_precision_are_refused():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="keep weights in float32"):
        MuonAdamW([{"kind": "adamw", "params": [("w", p)], "lr": 0.1}])


def test_setup_optimizer_puts_each_parameter_in_its_group():
    "With every addition of the model switched on."
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=4, n_head=2, n_kv_head=1,
                          n_embd=192, value_embeds=True, residual_scalars=True, smear=True,
                          backout=True)).init_weights(seed=0)
    model.compute_dtype = torch.bfloat16
    optimizer = setup_optimizer(model, matrix_lr=0.03, scalar_lr=0.4)
    where = [(name, group) for group in optimizer.param_groups for name, _ in group["params"]]
    assert sorted(name for name, _ in where) == sorted(name for name, _ in model.named_parameters())
    rates = {name: (group["kind"], group["lr"]) for name, group in where}
    # (192 / 768) ** -0.5 = 2; the rates of matrices and scalars do not know the width
    assert rates["transformer.wte.weight"] == ("adamw", pytest.approx(0.2 * 2))
    assert rates["lm_head.weight"] == ("adamw", pytest.approx(0.004 * 2))
    assert rates["transformer.h.0.attn.c_q.weight"] == ("muon", 0.03)
    assert rates["transformer.h.3.attn.value_gate.weight"] == ("muon", 0.03)
    assert rates["transformer.h.3.attn.value_embed.weight"] == ("adamw", pytest.approx(0.1 * 2))
    assert rates["resid_lambdas"] == ("adamw", pytest.approx(0.004))
    assert rates["x0_lambdas"] == ("adamw", pytest.approx(0.4))
    for gate in ("smear_gate.weight", "smear_lambda", "backout_lambda"):
        assert rates[gate] == ("adamw", pytest.approx(0.16))
    assert all(group["ns_dtype"] == torch.bfloat16 for group in optimizer.param_groups
               if group["kind"] == "muon")
    idx = torch.randint(32, (2, 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        model(idx, idx).backward()
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_schedules():
    assert lr_schedule(0, 10) == 1.0
    assert [lr_schedule(s, 10, 0.2, 0.4, 0.1) for s in (0, 1, 2, 6, 8, 10)] == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, 0.55, 0.1])
    assert lr_schedule(0, 1) > 0                # a run of a single step still learns
    assert momentum_schedule(0) == 0.85 and momentum_schedule(150) == pytest.approx(0.9)
    assert momentum_schedule(9999) == 0.95


def test_adamw_first_step_is_the_learning_rate():
    p = torch.zeros(3)
    adamw_update(p, torch.tensor([5.0, -0.001, 0.0]), torch.zeros(3), torch.zeros(3), 1, lr=0.1)
    torch.testing.assert_close(p, torch.tensor([-0.1, 0.1, 0.0]))
