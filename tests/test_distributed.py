"""Training on 1, 2 and 3 ranks is one and the same training: curves, resumed runs, other engines.

What is tested elsewhere: one optimizer step at 1, 2, 3, 5 and 7 ranks, five equal matrices among
them, to 1e-12 in fp64 and 1e-6 in fp32, in test_optimizer (`test_ranks_agree`), as is that every
split of a batch into ranks and micro-batches gives the same update
(`test_update_does_not_depend_on_how_the_batch_is_split`) and the trace of a bare step's collectives;
the saved state itself on other numbers of ranks, and a rank that fails in a save, in
test_checkpoint; overflow on one rank in test_training; torchrun and SIGKILL in test_pipeline.

All checks of one number of ranks share its processes and its group.
"""
import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.optimizer import POLAR_EXPRESS, MuonAdamW
from nanochat_nb.pretraining import pretrain, resume_run
from nanochat_nb.tokenizer import Tokenizer
from small_run import (DOCUMENTS, RATES, ROWS, STEPS, masked, record_collectives, small_loader,
                       small_model, small_optimizer, start_ranks, train)

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}      # measured over 30 steps: 6e-7 and 2e-15
MICRO_BATCH = {1: 12, 2: 6, 3: 6}                    # rows on all ranks together: 1, 2, 2 a step
HALF, END = 15, 30                                   # steps; an epoch is about 20


pytestmark = pytest.mark.usefixtures("one_thread")   # as in the ranks


# ------------------------------------------------------------------------ what ranks do

def curve(model, optimizer, loader, start, stop) -> list[list[float]]:
    "Each step's loss as the log has it, in fp32, and a fixed batch's after it, in the model's dtype."
    probe, points = masked(next(small_loader())), []
    for step in range(start, stop):
        points += [[*train(model, optimizer, loader, step, step + 1)]]
        with torch.no_grad():
            points[-1].append(model(*probe).item())
    return points


def straight(rank, world_size, folder, name):
    "30 steps; two ranks save half way."
    model = small_model(DTYPES[name])
    optimizer = small_optimizer(model, rank, world_size)
    loader = small_loader(rank, world_size, MICRO_BATCH[world_size])
    points = curve(model, optimizer, loader, 0, HALF)
    if world_size == 2:
        save_checkpoint("base", name, HALF, model, optimizer, {
            "settings": {}, "num_iterations": STEPS, "loader": loader.state_dict()},
            rank=rank, world_size=world_size)
    points += curve(model, optimizer, loader, HALF, END)
    store(folder, f"straight-{name}-{world_size}-{rank}", points, model)


def resumed(rank, world_size, folder, name):
    "The second half, from what two ranks saved."
    model = small_model(DTYPES[name], seed=1)
    optimizer = small_optimizer(model, rank, world_size)
    meta = resume_run("base", name, {}, model, optimizer)
    loader = small_loader(rank, world_size, MICRO_BATCH[world_size], meta["loader"])
    points = curve(model, optimizer, loader, meta["step"], END)
    store(folder, f"resumed-{name}-{world_size}-{rank}", points, model)


def store(folder, name, points, model):
    (folder / f"{name}.json").write_text(json.dumps(points))
    save_file(model.state_dict(), folder / f"{name}.safetensors")


def dense_model():
    "No weight is zero, so that each has a gradient from the first step on."
    model = small_model(torch.float64)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1, generator=generator)
    return model


ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SHARED_STEPS = 3


def replicated_and_fully_sharded(rank, world_size, folder):
    "The same three steps of AdamW with whole weights on each rank, and with FSDP2."
    replicated, sharded = dense_model(), dense_model()
    named = list(replicated.named_parameters())
    ours = MuonAdamW([{"kind": "adamw", "params": named, **ADAMW}], rank, world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (*sharded.transformer.h, sharded):
        fully_shard(part, mesh=mesh).set_gradient_divide_factor(1.0)    # sum, as ours, not mean
    theirs = torch.optim.AdamW(sharded.parameters(), **ADAMW)
    held = sum(q.to_local().numel() for q in sharded.parameters())
    assert held < 1.1 * sum(p.numel() for _, p in named) / world_size, "weights are not spread"
    for step in range(SHARED_STEPS):
        sharded.recompute, sharded.chunk_tokens = step > 0, 16 * step     # the ways to save memory
        loader = small_loader(rank, world_size, state={"epoch": 0, "window": 0, "row": step * ROWS})
        inputs, targets = masked(next(loader))
        found = {}
        for kind, model in (("ours", replicated), ("theirs", sharded)):
            loss = model(inputs, targets, reduction="sum") / 200
            loss.backward()
            found[f"loss|{kind}"] = loss.detach()
        for (name, p), q in zip(named, sharded.parameters(), strict=True):
            found[f"{name}|ours"], found[f"{name}|theirs"] = p.grad.clone(), q.grad.full_tensor()
            dist.all_reduce(found[f"{name}|ours"])      # as our optimizer will do with p.grad
        if rank == 0:
            save_file(found, folder / f"gradients-{world_size}-{step}.safetensors")
        ours.step()
        theirs.step()
        theirs.zero_grad()
    full = {name: q.full_tensor() for name, q in sharded.named_parameters()}
    if rank == 0:
        save_file(full, folder / f"fsdp-{world_size}.safetensors")
        save_file(dict(named), folder / f"replicated-{world_size}.safetensors")


def traced_pretraining(rank, world_size, folder):
    "The whole stage, as torchrun would start it; leaves what it asked the other ranks for."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      NANOCHAT_DTYPE="float32")
    calls = record_collectives()
    pretrain(depth=1, data_dir=str(folder / "data"), max_seq_len=32, device_batch_size=2,
             total_batch_size=384, num_iterations=4, save_every=2, eval_every=2, eval_tokens=768,
             model_tag=f"trace{world_size}", device_type="cpu", compile=0, extras="all")
    (folder / f"calls-{world_size}-{rank}").write_text("\n".join(calls))


def everything(rank, world_size, folder):
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    for name in DTYPES:
        straight(rank, world_size, folder, name)
        resumed(rank, world_size, folder, name)
    if world_size > 1:
        replicated_and_fully_sharded(rank, world_size, folder)
        traced_pretraining(rank, world_size, folder)     # leaves the group: the last one


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    "What the ranks left; two first, as they make the checkpoint that all resume."
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "data").mkdir()
    for i, documents in enumerate((DOCUMENTS[:30], DOCUMENTS[30:])):
        pq.write_table(pa.table({"text": documents}), folder / f"data/shard_{i:05d}.parquet")
    Tokenizer.train(DOCUMENTS, 300).save(folder / "tokenizer")
    for world_size in (2, 3):
        start_ranks(everything, world_size, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        everything(0, 1, folder)
    return folder


def points_of(results, kind, dtype, world_size, rank=0) -> torch.Tensor:
    "(steps, 2): the logged loss and the fixed batch's."
    path = results / f"{kind}-{dtype}-{world_size}-{rank}.json"
    return torch.tensor(json.loads(path.read_text()), dtype=torch.float64)


def distances(a, b) -> dict[str, float]:
    "‖a − b‖ / ‖b‖ of each tensor."
    assert a.keys() == b.keys()
    return {name: ((a[name] - b[name]).norm() / b[name].norm()).item() for name in b}


# -------------------------------------------------------------------------- one training

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_curves_do_not_depend_on_the_ranks(results, dtype, world_size):
    one = points_of(results, "straight", dtype, 1)
    assert one[0, 0] == pytest.approx(math.log(32), abs=1e-4) and one[-1, 0] < 0.5 * one[0, 0]
    many = points_of(results, "straight", dtype, world_size)
    logged, probe = (many - one).abs().amax(dim=0).tolist()
    assert logged < TOLERANCE["float32"] and probe < TOLERANCE[dtype], (logged, probe)
    for rank in range(1, world_size):
        assert torch.equal(points_of(results, "straight", dtype, world_size, rank), many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_two_ranks_save_and_others_train_on(results, dtype, world_size):
    "The same losses as without a stop; on as many ranks as before, the same bits."
    expected = points_of(results, "straight", dtype, 2)[HALF:]
    found = points_of(results, "resumed", dtype, world_size)
    if world_size == 2:
        assert torch.equal(found, expected)
        weights = [load_file(results / f"{kind}-{dtype}-2-1.safetensors")
                   for kind in ("resumed", "straight")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    logged, probe = (found - expected).abs().amax(dim=0).tolist()
    assert logged < TOLERANCE["float32"] and probe < TOLERANCE[dtype], (logged, probe)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_ask_for_the_same(results, world_size):
    """Names, sizes, dtypes and order of all collectives of four steps with clipping, three
    evaluations and two saves; none comes from a thread, whose place among them would be chance."""
    calls = [(results / f"calls-{world_size}-{rank}").read_text() for rank in range(world_size)]
    assert len(set(calls)) == 1, "ranks would wait for each other for ever"
    lines = calls[0].splitlines()
    assert not [line for line in lines if line.startswith("a thread")]
    names = [line.split()[0] for line in lines]
    assert names.count("all_reduce") >= 4 + 3              # in each step, in each evaluation
    assert any("reduce_scatter" in name for name in names)
    assert sum("float64" in line for line in lines) == 3   # sums of the evaluations
    assert any("object" in line for line in lines)         # random states, in the saves


# --------------------------------------------------------------------- another optimizer

def plain_adamw(w, g, state, t, lr, beta1):
    m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g**2
    return w - lr * (m / (1 - beta1**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)


def plain_muon(w, g, state, lr, momentum):
    "One matrix: momentum, five polynomials, equal neurons, careful decay; nothing shared, no stack."
    m = state["m"] = momentum * state.get("m", 0) + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * m
    x = x / (x.norm() + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    n_out, n_in = w.shape
    along = 1 if n_out >= n_in else 0
    v = state["v"] = 0.9 * state.get("v", 0) + 0.1 * (x**2).mean(along, keepdim=True)
    equal = x / v.sqrt().clamp(min=1e-10)
    update = equal * x.norm() / max(equal.norm(), 1e-10)
    decay = torch.where(update * w >= 0, 0.1 * lr * w, 0)
    return w - decay - lr * max(1, n_out / n_in) ** 0.5 * update


def test_a_plain_optimizer_gives_the_same_weights(results):
    """30 steps of one process with whole matrices and formulas, against two ranks with a shared
    state that was saved, read again and trained on."""
    model, loader = small_model(torch.float64), small_loader()
    weights, states = dict(model.named_parameters()), {}
    start = {name: w.clone() for name, w in weights.items()}
    for step in range(END):
        inputs, targets = masked(next(loader))
        loss = model(inputs, targets, reduction="sum") / (targets >= 0).sum()
        grads = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
        norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
        warm, momentum = min((step + 1) / 5, 1), 0.85 + 0.10 * min(step / 10, 1)
        for name, w in weights.items():
            g, state = grads[name] * min(1, 0.5 / (norm + 1e-6)), states.setdefault(name, {})
            plain_table = "wte" in name or "value_embed" in name or "lm_head" in name
            if ".h." in name and not plain_table:
                new = plain_muon(w, g, state, warm * RATES[".h."], momentum)
            else:
                rate = next((r for part, r in RATES.items() if part in name), RATES["smear"])
                beta1 = 0.96 if name == "x0_lambdas" else 0.8
                new = plain_adamw(w, g, state, step + 1, warm * rate, beta1)
            w.data.copy_(new)
    sharded = load_file(results / "resumed-float64-2-0.safetensors")
    plain = {name: w.detach() for name, w in weights.items()}
    assert min(distances(start, plain).values()) > 1e-3, "some weight was not trained"
    found = distances(sharded, plain)
    assert max(found.values()) < 1e-9, max(found, key=found.get)


# ----------------------------------------------------------------------- another engine

@pytest.mark.parametrize("world_size", [2, 3])
def test_fully_sharded_equals_replicated(results, world_size):
    """Nothing in GPT prevents PyTorch's FSDP2: with `fully_shard` on each block and the whole, loss and
    gradients of three steps are the all-reduced ones of whole weights, and after these steps of
    torch.optim.AdamW on the shards the weights are those of our AdamW, which shares out its state.
    (Muon needs whole matrices, which FSDP2 cuts into rows: it is not compared.)"""
    for step in range(SHARED_STEPS):
        found = load_file(results / f"gradients-{world_size}-{step}.safetensors")
        ours, theirs = ({name.split("|")[0]: g for name, g in found.items() if name.endswith(kind)}
                        for kind in ("|ours", "|theirs"))
        norm = math.sqrt(sum(g.norm().item() ** 2 for g in ours.values()))
        for name, g in ours.items():       # the terms of a single number's gradient may cancel
            assert (theirs[name] - g).norm() < 1e-12 * max(g.norm(), 1e-3 * norm), name
    ours, theirs = (load_file(results / f"{kind}-{world_size}.safetensors")
                    for kind in ("replicated", "fsdp"))
    start = {name: p.detach() for name, p in dense_model().named_parameters()}
    assert min(distances(start, ours).values()) > 1e-3
    assert max(distances(theirs, ours).values()) < 1e-12
