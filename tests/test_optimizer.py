"""The optimizer against PyTorch's, and the same step on 1, 2 and 3 processes (gloo)."""
import gc
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from nanochat_nb.common import UserError
from nanochat_nb.optimizer import (MuonAdamW, adamw_update, assign_owners, clip_grad_norm,
                                   lr_schedule, make_shares, momentum_schedule, muon_update,
                                   orthogonalize, setup_optimizer)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Toy(nn.Module):
    "Tables, five matrices of one shape, two others, a vector, and a matrix that is never used."

    def __init__(self, dtype):
        super().__init__()
        self.wte = nn.Embedding(17, 8)
        self.square = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(5)])
        self.up = nn.Parameter(torch.randn(8, 12) / 3)
        self.down = nn.Parameter(torch.randn(12, 8) / 3)
        self.gain = nn.Parameter(torch.ones(8))
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.lm_head = nn.Parameter(torch.randn(17, 8) / 3)
        self.to(dtype)

    def forward(self, idx, targets, use_rare):
        x = self.wte(idx)
        for matrix in self.square:
            x = x + torch.tanh(x @ matrix)
        if use_rare:  # in some micro-batches only: its gradient is None on some ranks
            x = x + torch.relu(x @ self.up) @ self.down
        logits = (x * self.gain) @ self.lm_head.T
        return nn.functional.cross_entropy(logits, targets, reduction="sum")


def toy_optimizer(model, rank, world_size, dtype):
    adamw = {"wte.weight", "lm_head", "gain"}
    named = list(model.named_parameters())
    return MuonAdamW([
        {"kind": "adamw", "params": [(n, p) for n, p in named if n in adamw], "lr": 0.01,
         "weight_decay": 0.1},
        {"kind": "muon", "params": [(n, p) for n, p in named if n not in adamw], "lr": 0.02,
         "weight_decay": 0.1, "cautious": True, "ns_dtype": dtype}], rank, world_size)


def train(model, optimizer, steps, rank, world_size, max_norm=None):
    "A step's global batch is 6 micro-batches of unequal numbers of tokens, dealt to the ranks."
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randint(17, (2, 3 + i), generator=generator) for i in range(6)]
        tokens = sum(b.size(1) for b in batch)
        for i, (idx, targets) in enumerate(batch):
            if i % world_size == rank:
                (model(idx, targets, use_rare=i == 0) / tokens).backward()
        optimizer.step(lr_schedule(step, 6), momentum_schedule(step, 6), max_norm)
        optimizer.zero_grad()


def run(rank, world_size, dtype, folder):
    "6 steps straight, and 3 steps from what two ranks saved half way; stores the weights."
    for max_norm in (None, 0.5):
        torch.manual_seed(0)
        model = Toy(dtype)
        optimizer = toy_optimizer(model, rank, world_size, dtype)
        train(model, optimizer, range(3), rank, world_size, max_norm)
        name = f"{str(dtype)[6:]}-{max_norm}"
        if world_size == 2:
            save_file(optimizer.state_dict(), folder / f"{name}-optimizer-{rank}.safetensors")
            if rank == 0:
                save_file(model.state_dict(), folder / f"{name}-half.safetensors")
            dist.barrier()
        train(model, optimizer, range(3, 6), rank, world_size, max_norm)

        torch.manual_seed(1)
        resumed = Toy(dtype)
        resumed.load_state_dict(load_file(folder / f"{name}-half.safetensors"))
        second = toy_optimizer(resumed, rank, world_size, dtype)
        second.load_state_dict(load_file(folder / f"{name}-optimizer-0.safetensors")
                               | load_file(folder / f"{name}-optimizer-1.safetensors"))
        train(resumed, second, range(3, 6), rank, world_size, max_norm)
        for kind, result in (("straight", model), ("resumed", resumed)):
            save_file(result.state_dict(),
                      folder / f"{name}-{kind}-{world_size}-{rank}.safetensors")


def worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world_size}", rank=rank,
                            world_size=world_size)
    for dtype in TOLERANCE:
        run(rank, world_size, dtype, folder)
    dist.destroy_process_group()
    gc.collect()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Weights after 6 steps on 1, 2 and 3 ranks, straight and resumed."
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (2, 3):
        mp.spawn(worker, args=(world_size, folder), nprocs=world_size)
    for dtype in TOLERANCE:
        run(0, 1, dtype, folder)
    return folder


def distance(a, b):
    "‖a − b‖ / ‖b‖ of the worst tensor."
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in b)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ranks_agree(results, dtype, max_norm):
    name = f"{str(dtype)[6:]}-{max_norm}"
    expected = load_file(results / f"{name}-straight-1-0.safetensors")
    for world_size in (1, 2, 3):
        for kind in ("straight", "resumed"):
            ranks = [load_file(results / f"{name}-{kind}-{world_size}-{rank}.safetensors")
                     for rank in range(world_size)]
            assert distance(ranks[0], expected) <= TOLERANCE[dtype], (kind, world_size)
            assert all(torch.equal(r[k], expected[k]) or torch.equal(r[k], ranks[0][k])
                       for r in ranks for k in expected), "ranks hold different weights"


def test_clipping_changed_something(results):
    free, clipped = (load_file(results / f"float64-{max_norm}-straight-1-0.safetensors")
                     for max_norm in (None, 0.5))
    assert distance(free, clipped) > 1e-3


def test_state_is_spread(results):
    parts = [load_file(results / f"float32-None-optimizer-{rank}.safetensors") for rank in (0, 1)]
    sizes = [sum(t.numel() for t in part.values()) for part in parts]
    model = Toy(torch.float32)
    whole = sum(t.numel() for t in toy_optimizer(model, 0, 1, None).state_dict().values())
    assert sum(sizes) == whole
    assert max(sizes) < 0.75 * whole


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
                            "ns_dtype": torch.bfloat16}])
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b, w in zip(ours, theirs, weights):
        assert (a - b).norm() / (b - w).norm() < 0.02  # what bf16 rounding leaves open


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 33), (33, 5), (1, 9)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    result = orthogonalize(matrices)
    # the rule acts on singular values only: same singular vectors, new values by the polynomial
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(result, u @ s.diag_embed() @ vh, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalize(matrices[1]), result[1], rtol=0, atol=1e-12)
    assert orthogonalize(torch.zeros(4, 4)).abs().sum() == 0


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


def test_clip_grad_norm_equals_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(n, 3)) for n in (1, 4)]
    theirs = [nn.Parameter(torch.zeros(n, 3)) for n in (1, 4)]
    for a, b in zip(ours, theirs):
        a.grad = torch.randn_like(a) * 10
        b.grad = a.grad.clone()
    torch.testing.assert_close(clip_grad_norm(ours, 1.0),
                               torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(UserError, match="above 0"):
        clip_grad_norm(ours, 0.0)


def test_owners_are_balanced():
    assert assign_owners([4, 3, 3, 2], 2) == [0, 1, 1, 0]
    for world_size in (1, 2, 3, 5, 7, 8):
        costs = [64] * 80 + [256] * 40 + [1000] * 2
        owners = assign_owners(costs, world_size)
        load = [sum(c for c, o in zip(costs, owners) if o == r) for r in range(world_size)]
        # the dearest-first rule is never worse than 4/3 of the best (Graham 1969)
        assert max(load) <= 4 / 3 * max(max(costs), math.ceil(sum(costs) / world_size))


def test_stacks_are_limited(monkeypatch):
    import nanochat_nb.optimizer as module
    monkeypatch.setattr(module, "MAX_STACK", 3 * 16)
    params = [(str(i), nn.Parameter(torch.randn(4, 4))) for i in range(7)]
    shares = make_shares({"kind": "muon", "params": params}, 1)
    assert [len(s.params) for s in shares] == [3, 3, 1]


def test_state_refuses_what_does_not_fit():
    def optimizer(shape):
        matrix = nn.Parameter(torch.zeros(shape))
        return MuonAdamW([{"kind": "muon", "params": [("m", matrix)], "lr": 0.1}])
    with pytest.raises(UserError, match="fresh optimizer"):
        optimizer((2, 2)).load_state_dict({})
    with pytest.raises(UserError, match="shape"):
        optimizer((2, 2)).load_state_dict(optimizer((2, 3)).state_dict())


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


def test_setup_optimizer_puts_each_parameter_in_its_group():
    from nanochat_nb.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=1,
                          n_embd=192))
    model.init_weights(seed=0)
    model.compute_dtype = torch.bfloat16
    optimizer = setup_optimizer(model, matrix_lr=0.03)
    where = {name: (group["kind"], group["lr"]) for group in optimizer.param_groups
             for name, _ in group["params"]}
    assert set(where) == {name for name, _ in model.named_parameters()}
    # (192 / 768) ** -0.5 = 2
    assert where["transformer.wte.weight"] == ("adamw", pytest.approx(0.2 * 2))
    assert where["lm_head.weight"] == ("adamw", pytest.approx(0.004 * 2))
    assert where["transformer.h.0.attn.c_q.weight"] == ("muon", 0.03)
    assert all(group["ns_dtype"] == torch.bfloat16 for group in optimizer.param_groups
               if group["kind"] == "muon")
    idx = torch.randint(32, (2, 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
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
