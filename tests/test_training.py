"""Training in fp16: what overflows changes nothing, on any rank; a resumed run goes on alike."""
import inspect
import math
import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import pretrain, resume_run, train_step

CONFIG = GPTConfig(sequence_len=12, vocab_size=30, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)


def small_run(dtype=torch.float16, seed=0, rank=0, world_size=1):
    "Model and optimizer of a run; the first loss scales are far too large for fp16."
    model = GPT(CONFIG).init_weights(seed)
    model.compute_dtype = dtype
    optimizer = setup_optimizer(model, rank=rank, world_size=world_size)
    if dtype == torch.float16:
        optimizer.scaler.value = 2.0**30
    return model, optimizer


def micro_batch(seed=0, weight=None):
    idx = torch.randint(30, (2, 13), generator=torch.Generator().manual_seed(seed))
    weights = [] if weight is None else [torch.full((2, 12), weight)]
    return (idx[:, :-1], idx[:, 1:], *weights)


def snapshot(model, optimizer):
    "All that a step may change but the scaler: weights, moments, step counts."
    return {k: v.clone() for k, v in (model.state_dict() | optimizer.state_dict()).items()}


def assert_same(before, after):
    assert set(before) == set(after)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def step_counts(state):
    return {int(v) for k, v in state.items() if k.endswith("|step")}


def overflow(model, optimizer, micro_batches):
    "Steps until one is taken; gives how many were not."
    skipped = 0
    while True:
        before, scale = snapshot(model, optimizer), optimizer.scaler.value
        loss, grad_norm = train_step(model, optimizer, micro_batches)
        assert math.isfinite(loss)
        if math.isfinite(grad_norm):
            assert optimizer.scaler.value == scale
            return skipped
        skipped += 1
        assert optimizer.scaler.value == scale / 2
        assert_same(before, snapshot(model, optimizer))
        assert step_counts(before) <= {0}, "a step that was left out counts"
        assert all(p.grad is None for p in model.parameters())


def test_overflow_in_fp16_changes_nothing_but_the_scale():
    model, optimizer = small_run()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    start = snapshot(model, optimizer)
    assert step_counts(start) == {0}
    skipped = overflow(model, optimizer, [micro_batch(), micro_batch(1)])
    assert skipped >= 3 and optimizer.scaler.value == 2.0 ** (30 - skipped)
    after = snapshot(model, optimizer)
    assert step_counts(after) == {1} and not torch.equal(after["lm_head.weight"],
                                                         start["lm_head.weight"])
    losses = [train_step(model, optimizer, [micro_batch(), micro_batch(1)])[0] for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5, "no progress after the overflow"
    assert all(torch.isfinite(v).all() for v in snapshot(model, optimizer).values())


def test_fp16_ends_up_where_fp32_does():
    "After the scale has found its place, the same steps give nearly the same losses."
    runs = {dtype: small_run(dtype) for dtype in (torch.float32, torch.float16)}
    overflow(*runs[torch.float16], [micro_batch()])
    train_step(*runs[torch.float32], [micro_batch()])
    losses = {dtype: [train_step(*run, [micro_batch(i)])[0] for i in range(10)]
              for dtype, run in runs.items()}
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.01)


def test_gradients_that_stay_infinite_end_the_run():
    model, optimizer = small_run()
    optimizer.scaler.value = 4.0
    model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    before = snapshot(model, optimizer)
    with pytest.raises(UserError, match="diverged"):
        for _ in range(4):
            train_step(model, optimizer, [micro_batch()])
    assert_same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_that_is_not_finite_changes_nothing(dtype, weight):
    "Nor does it move the scale: no scale makes a NaN finite."
    model, optimizer = small_run(dtype)
    if optimizer.scaler:
        overflow(model, optimizer, [micro_batch()])
    before, scaler = snapshot(model, optimizer), optimizer.scaler and optimizer.scaler.state_dict()
    with pytest.raises(UserError, match="step was not taken"):
        train_step(model, optimizer, [micro_batch(0, 1.0), micro_batch(1, weight)])
    assert_same(before, snapshot(model, optimizer))
    assert (optimizer.scaler and optimizer.scaler.state_dict()) == scaler
    assert all(p.grad is None for p in model.parameters())
    loss, grad_norm = train_step(model, optimizer, [micro_batch()])      # the run can go on
    assert math.isfinite(loss) and math.isfinite(grad_norm)


def test_an_infinite_gradient_without_a_scaler_changes_nothing():
    model, optimizer = small_run(torch.float32)
    hook = model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    before = snapshot(model, optimizer)
    with pytest.raises(UserError, match="gradient norm"):
        train_step(model, optimizer, [micro_batch()])
    assert_same(before, snapshot(model, optimizer))
    hook.remove()
    train_step(model, optimizer, [micro_batch()])
    assert step_counts(snapshot(model, optimizer)) == {1}


# ---------------------------------------------------------------- resuming


SETTINGS = {name: p.default for name, p in inspect.signature(pretrain).parameters.items()}
NEWER = {"extras": "smear", "window_pattern": "SSSL", "fp8": True}       # and not their defaults


def save(model, optimizer, settings=SETTINGS):
    save_checkpoint("base", "d2", 3, model, optimizer,
                    {"settings": settings, "num_iterations": 10})


def test_resumed_run_has_the_same_scaler(base_dir):
    model, optimizer = small_run()
    overflow(model, optimizer, [micro_batch()])
    train_step(model, optimizer, [micro_batch(1)])
    scaler = optimizer.scaler.state_dict()
    assert scaler["good_steps"] == 2 and scaler["value"] < 2.0**30
    save(model, optimizer)
    second, fresh = small_run(seed=1)
    assert resume_run("base", "d2", SETTINGS, second, fresh)["step"] == 3
    assert fresh.scaler.state_dict() == scaler
    assert_same(snapshot(model, optimizer), snapshot(second, fresh))
    results = [train_step(m, o, [micro_batch(2)]) for m, o in ((model, optimizer), (second, fresh))]
    assert results[0] == results[1], "the next step differs"
    assert_same(snapshot(model, optimizer), snapshot(second, fresh))


def test_a_checkpoint_without_a_scale_starts_a_new_one(base_dir):
    "A run that began in fp32 may go on in fp16."
    model, optimizer = small_run(torch.float32)
    train_step(model, optimizer, [micro_batch()])
    save(model, optimizer)
    second, fresh = small_run(seed=1)
    assert resume_run("base", "d2", SETTINGS, second, fresh)
    assert fresh.scaler.value == 2.0**30 and fresh.scaler.good_steps == 0
    assert_same(snapshot(model, optimizer), snapshot(second, fresh))


def test_a_checkpoint_older_than_a_flag_resumes_with_its_default(base_dir):
    model, optimizer = small_run()
    overflow(model, optimizer, [micro_batch()])
    old = {name: value for name, value in SETTINGS.items() if name not in NEWER}
    save(model, optimizer, old)
    then = SETTINGS | {"extras": ""}             # additions were off when there was no flag for them
    for name, value in NEWER.items():
        second, fresh = small_run(seed=1)
        before = snapshot(second, fresh)
        with pytest.raises(UserError, match=f"other settings: {name}=.*, now {value!r}"):
            resume_run("base", "d2", then | {name: value}, second, fresh)
        assert_same(before, snapshot(second, fresh))
        assert fresh.scaler.value == 2.0**30
    second, fresh = small_run(seed=1)
    assert resume_run("base", "d2", then, second, fresh)["step"] == 3
    assert_same(snapshot(model, optimizer), snapshot(second, fresh))


def test_other_settings_are_refused(base_dir):
    save(*small_run(), SETTINGS | {"fp8": True})
    with pytest.raises(UserError, match="fp8=True, now False"):
        resume_run("base", "d2", SETTINGS, *small_run())
    assert resume_run("base", "d2", SETTINGS | {"fp8": True, "run": "again"}, *small_run())


# ---------------------------------------------------------------- two ranks


def overflow_on_one(rank, world_size, folder):
    "Rank 0's tokens weigh so little that its own gradients stay finite at any scale used here."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank,
                            world_size=world_size, timeout=timedelta(seconds=60))
    model, optimizer = small_run(rank=rank, world_size=world_size)
    batch = [micro_batch(rank, weight=(1e-6, 1.0)[rank])]

    alone = GPT(CONFIG).init_weights(0)              # what this rank meets without the other
    alone.compute_dtype = torch.float16
    inputs, targets, weights = batch[0]
    loss = (alone(inputs, targets, reduction="none") * weights).sum() / 48
    (loss * optimizer.scaler.value).backward()
    own = all(torch.isfinite(p.grad).all() for p in alone.parameters())
    assert own == (rank == 0), "the test needs a gradient that overflows on rank 1 only"

    skipped = overflow(model, optimizer, batch)
    for _ in range(3):
        train_step(model, optimizer, batch)
    before = snapshot(model, optimizer)
    spot = torch.zeros(model.lm_head.weight.shape).index_fill(0, torch.tensor(0),
                                                                  (0.0, math.inf)[rank])
    hook = model.lm_head.weight.register_hook(lambda grad: grad + spot)  # in rows of one owner
    assert not math.isfinite(train_step(model, optimizer, batch)[1])
    hook.remove()
    assert_same(before, snapshot(model, optimizer))
    scaler = optimizer.scaler.state_dict()
    with pytest.raises(UserError, match="step was not taken"):      # on both ranks, so none waits
        train_step(model, optimizer, [micro_batch(0, weight=(1.0, math.nan)[rank])])
    assert_same(before, snapshot(model, optimizer))
    assert optimizer.scaler.state_dict() == scaler
    train_step(model, optimizer, batch)
    numbers = torch.tensor([skipped, *optimizer.scaler.state_dict().values()], dtype=torch.float64)
    save_file(model.state_dict() | {"numbers": numbers}, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_leave_out_the_same_steps(tmp_path):
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():     # torch is imported once
        multiprocessing.set_forkserver_preload(["nanochat_nb.pretraining", "pytest"])
        method = "forkserver"
    mp.start_processes(overflow_on_one, (2, tmp_path), 2, start_method=method)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    skipped, value, _, good_steps = first["numbers"].tolist()
    assert skipped >= 3 and value == 2.0 ** (29 - skipped) and good_steps == 1
    start = GPT(CONFIG).init_weights(0).state_dict()
    assert not torch.equal(first["lm_head.weight"], start["lm_head.weight"])
