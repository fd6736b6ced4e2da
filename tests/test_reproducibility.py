"""The same run gives the same numbers: again, next year, from an old checkpoint, in other formats.

    python tests/test_reproducibility.py golden      makes fixtures/golden_losses.json anew
    python tests/test_reproducibility.py checkpoint  adds fixtures/checkpoint_vN, once per format

What is tested elsewhere: exact resume in test_checkpoint, test_training and (with SIGKILL) in
test_pipeline; the order of samples on any number of ranks, for any documents, in test_dataloader
(`test_ranks_see_what_one_rank_would`, `test_two_ranks_stop_and_three_go_on`, `test_conversations`,
`test_real_text`); the error of one layer in every format, and that a small model learns alike in
all of them, in test_precision; that the compiled model's loss and gradients in fp32 are the eager
ones in test_gpt; of attention, in test_attention; frozen logits in test_gpt.
"""
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from nanochat_nb.checkpoint import (FORMAT_VERSION, find_checkpoint, find_damage, load_model,
                                    load_optimizer_state, read_meta, save_checkpoint)
from nanochat_nb.common import Compute
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.precision import use_fp8
from nanochat_nb.pretraining import pretrain, resume_run
from nanochat_nb.tokenizer import Tokenizer
from small_run import (DOCUMENTS, ROWS, STEPS, Letters, T, masked, small_loader, small_model,
                       small_optimizer, start_ranks, train)

FIXTURES = Path(__file__).parent / "fixtures"
CPU = Compute(torch.device("cpu"), torch.float32)


pytestmark = pytest.mark.usefixtures("one_thread")   # others may round sums otherwise


# ----------------------------------------------------------------------- the same again

@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    "Base folders of four runs: two of fresh processes, two of this one, which has drawn before."
    data = tmp_path_factory.mktemp("data")
    for i, documents in enumerate((DOCUMENTS[:30], DOCUMENTS[30:])):
        pq.write_table(pa.table({"text": documents}), data / f"shard_{i:05d}.parquet")
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    flags = {"depth": 1, "data_dir": str(data), "max_seq_len": 32, "device_batch_size": 4,
             "total_batch_size": 256, "num_iterations": 8, "save_every": 4, "eval_every": 4,
             "eval_tokens": 512, "device_type": "cpu", "compile": 0, "extras": "all"}
    names = ("first", "again", "after draws", "other seed")
    folders = {name: tmp_path_factory.mktemp("base") for name in names}
    processes = []
    for name, base in folders.items():
        tokenizer.save(base / "tokenizer")
        environment = {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32",
                       "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(len(name))}
        if name in ("first", "again"):
            command = [sys.executable, "-m", "nanochat_nb.pretraining"]
            command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            processes.append(subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **environment}))
            continue
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            random.random(), np.random.rand(), torch.rand(3), nn.Linear(4, 4)
            pretrain(**flags, seed=43 if name == "other seed" else 42)
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-2000:]
    return folders


def traces(base: Path) -> dict:
    "All that a run leaves which does not tell the time: log, hashes of weights and state, RNG."
    rows = [json.loads(line) for line in (base / "logs" / "base.jsonl").read_text().splitlines()]
    numbers = [{key: row[key] for key in ("step", "loss", "grad_norm", "val_bpb") if key in row}
               for row in rows]
    saved = {path.name: read_meta(path) for path in base.glob("checkpoints/base/d1/step_*")}
    return {"log": numbers, "files": {name: meta["files"] for name, meta in saved.items()},
            "rng": {name: meta["rng"] for name, meta in saved.items()},
            "loader": {name: meta["loader"] for name, meta in saved.items()}}


@pytest.mark.parametrize("name", ["again", "after draws"])
def test_same_seed_same_bits(runs, name):
    "Losses, norms, scores, weights, optimizer state and generators; hash seeds differ as well."
    first, again = traces(runs["first"]), traces(runs[name])
    assert sum("loss" in row for row in first["log"]) == 8
    assert sum("val_bpb" in row for row in first["log"]) == 3 and len(first["files"]) == 2
    for part in first:
        assert again[part] == first[part], part


def test_other_seed_other_bits(runs):
    first, other = traces(runs["first"]), traces(runs["other seed"])
    losses = [{row["loss"] for row in run["log"][2:] if "loss" in row} for run in (first, other)]
    assert not losses[0] & losses[1], "only the loss before the first update is the same, ln V"
    assert all(first["files"][step] != other["files"][step] for step in first["files"])


# ---------------------------------------------------------------------- order of samples

@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accum", [1, 3])
def test_every_step_has_the_same_samples_in_the_same_order(world_size, accum):
    "Over two epochs: 12 rows a step, however ranks and micro-batches share them."
    def of_a_step(loaders):
        "Rows of input and target, micro-batch by micro-batch, in each rank by rank."
        return [(tuple(x.tolist()), tuple(y.tolist()))
                for _ in range(accum if loaders is ranks else 1)
                for loader in loaders for x, y in zip(*masked(next(loader)))]
    whole = [small_loader()]
    ranks = [small_loader(rank, world_size, rows=ROWS // accum) for rank in range(world_size)]
    steps = 0
    while whole[0].epoch < 2:
        assert of_a_step(ranks) == of_a_step(whole), f"step {steps}"
        steps += 1
    assert steps > 30
    assert all(rank.state_dict() == whole[0].state_dict() for rank in ranks)


# ---------------------------------------------------------------------- stored losses

GOLDEN = FIXTURES / "golden_losses.json"


def fifty_steps(dtype=torch.float32, weights=torch.float32, device="cpu", rows=4,
                change=lambda optimizer: None) -> torch.Tensor:
    "Losses of the whole run; `weights` is their dtype, `dtype` that of the products."
    model = small_model(weights).to(device)
    model.compute_dtype = dtype
    optimizer = small_optimizer(model)
    change(optimizer)
    loader = small_loader(rows=rows)
    loader.device = torch.device(device)
    return torch.tensor(train(model, optimizer, loader, 0, STEPS), dtype=torch.float64)


def largest_deviation(losses, golden) -> float:
    "Relative, over all steps."
    return (losses / torch.as_tensor(golden, dtype=torch.float64) - 1).abs().max().item()


def make_golden() -> None:
    "The losses of this release, and how far other roundings of the same rules are from them."
    losses = fifty_steps()
    measured = {f"micro-batches of {rows}": largest_deviation(fifty_steps(rows=rows), losses)
                for rows in (1, 2, 6, 12)}
    measured["fp64"] = largest_deviation(fifty_steps(torch.float64, torch.float64), losses)
    torch.set_num_threads(2)
    measured["2 threads"] = largest_deviation(fifty_steps(), losses)
    torch.set_num_threads(1)
    measured["bf16 products"] = largest_deviation(fifty_steps(torch.bfloat16), losses)
    for name, variables in OTHER_PROCESSORS.items():
        process = subprocess.run([sys.executable, __file__, "losses"], capture_output=True,
                                 text=True, check=True, env={**os.environ, **variables})
        measured[name] = largest_deviation(torch.tensor(json.loads(process.stdout)).double(),
                                           losses)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({
        "what": "losses of the 50 steps of tests/small_run.py: CPU, fp32, one thread",
        "made by": "OMP_NUM_THREADS=1 python tests/test_reproducibility.py golden",
        "torch": torch.__version__,
        "tolerance": TOLERANCE, "tolerance in bf16": BF16_TOLERANCE,
        "largest relative deviation measured": {k: float(f"{v:.1e}") for k, v in measured.items()},
        "losses": losses.tolist()}, indent=1) + "\n")


TOLERANCE, BF16_TOLERANCE = 1e-4, 0.03
OTHER_PROCESSORS = {                 # the code that torch and its libraries have for older ones
    "no vector units": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
                        "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def test_golden_losses(golden):
    "50 steps that use every addition of the model, clipping, schedules and both optimizers."
    assert golden["tolerance"] == TOLERANCE and len(golden["losses"]) == STEPS
    rounding = [deviation for name, deviation in
                golden["largest relative deviation measured"].items() if "bf16" not in name]
    assert max(rounding) < TOLERANCE / 2, "the tolerance leaves no room for another CPU"
    assert largest_deviation(fifty_steps(), golden["losses"]) < TOLERANCE


def momentum(optimizer):
    optimizer.param_groups[-1]["beta2"] = 0.85


def betas(optimizer):
    optimizer.param_groups[0]["betas"] = (0.8, 0.94)


def not_cautious(optimizer):
    optimizer.param_groups[-1]["cautious"] = False


def rate(optimizer):
    optimizer.param_groups[2]["lr"] *= 1.01


@pytest.mark.parametrize("change", [momentum, betas, not_cautious, rate])
def test_golden_losses_tell_a_changed_rule(golden, change):
    assert largest_deviation(fifty_steps(change=change), golden["losses"]) > 3 * TOLERANCE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_golden_losses_in_bf16(golden, device):
    "Products in bf16: a band around the same curve."
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    deviation = largest_deviation(fifty_steps(torch.bfloat16, device=device), golden["losses"])
    assert TOLERANCE < deviation < BF16_TOLERANCE


# ------------------------------------------------------------------- stored checkpoints

TINY = {"n_embd": 8}        # the stored checkpoint is of a model of 2,300 numbers
SAVED_AT, CONTINUED = 8, 6  # steps before the stored checkpoint, and after it
STORED = sorted(path.name for path in FIXTURES.glob("checkpoint_v*"))


def all_settings() -> dict:
    "Of the stored run: what `pretrain` does when nobody says otherwise, in this release, but …"
    defaults = {name: p.default for name, p in inspect.signature(pretrain).parameters.items()}
    return defaults | {"depth": 2, "max_seq_len": T, "extras": "all", "weight_decay": 0.1,
                       "num_iterations": STEPS}


def save_on_two_ranks(rank, world_size, folder):
    "A run stopped half way, as `pretrain` saves it."
    os.environ.update(NANOCHAT_BASE_DIR=str(folder), RANK=str(rank))
    model = small_model(**TINY)
    optimizer = small_optimizer(model, rank, world_size)
    loader = small_loader(rank, world_size)
    train(model, optimizer, loader, 0, SAVED_AT)
    meta = {"settings": all_settings(), "num_iterations": STEPS, "loader": loader.state_dict(),
            "tokenizer_fingerprint": Letters().fingerprint()}
    save_checkpoint("base", "old", SAVED_AT, model, optimizer, meta, rank=rank,
                    world_size=world_size)


def continued(settings: dict) -> list[float]:
    "The losses of the steps after a checkpoint in the base folder, on one rank."
    model = small_model(seed=1, **TINY)
    optimizer = small_optimizer(model)
    meta = resume_run("base", "old", settings, model, optimizer)
    loader = small_loader(state=meta["loader"])
    return train(model, optimizer, loader, meta["step"], meta["step"] + CONTINUED)


def make_checkpoint() -> None:
    "A checkpoint of this release's format, and the losses that follow it, for later releases."
    target = FIXTURES / f"checkpoint_v{FORMAT_VERSION}"
    if target.exists():
        sys.exit(f"{target.name} is there: it shows what older releases wrote, and must not change")
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        start_ranks(save_on_two_ranks, 2, base)
        shutil.copytree(next(Path(base).glob("checkpoints/base/old/step_*")), target)
        losses = continued(all_settings())
    (target / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    for file in target.iterdir():
        file.chmod(0o644)


@pytest.fixture(params=STORED)
def stored(request, base_dir) -> Path:
    "A stored checkpoint as the newest of a base folder."
    path = base_dir / "checkpoints" / "base" / "old" / f"step_{SAVED_AT:06d}"
    shutil.copytree(FIXTURES / request.param, path)
    return path


def test_there_is_a_checkpoint_of_the_first_format():
    "And of each format this release knows, so that none is forgotten."
    assert "checkpoint_v1" in STORED and f"checkpoint_v{FORMAT_VERSION}" in STORED


def test_an_old_checkpoint_is_a_model(stored):
    assert find_checkpoint("base", "old", verify="all") == stored and not find_damage(stored, "all")
    model, _, meta = load_model("base", CPU, tag="old", tokenizer=Letters())
    assert (meta["step"], meta["stage"], meta["tag"]) == (SAVED_AT, "base", "old")
    assert model.config.to_dict() == small_model(**TINY).config.to_dict()
    inputs, targets = masked(next(small_loader(state=meta["loader"])))
    next_loss = json.loads((stored / "losses.json").read_text())[0]
    assert model(inputs, targets).item() == pytest.approx(next_loss, rel=1e-5)


def test_an_old_checkpoint_trains_on(stored):
    "Saved by two ranks, resumed by one, as if this release had trained it from the start."
    optimizer = small_optimizer(small_model(**TINY))
    state = load_optimizer_state(stored)
    assert {tuple(key.split("|")[:2]) for key in state} == \
        {tuple(key.split("|")) for key in optimizer.state_dict()}
    assert any("rows" in key for key in state) and len(read_meta(stored)["rng"]) == 2
    losses = json.loads((stored / "losses.json").read_text())
    assert continued(all_settings() | read_meta(stored)["settings"]) == pytest.approx(losses,
                                                                                      rel=1e-5)


# ------------------------------------------------------------------------ number formats

# largest relative error of a block's output or the loss, and of a gradient; about twice what was
# measured with three blocks: 4e-7 and 1e-6; 0.9% and 2.5%; 0.11% and 0.4%; 6% and 14%
LIMITS = {"float32": (1e-6, 3e-6), "bfloat16": (0.018, 0.05), "float16": (0.0022, 0.008),
          "fp8": (0.12, 0.28)}


ADDITIONS = dict.fromkeys(("value_embeds", "residual_scalars", "smear", "backout"), True)


def model_in(name, n_layer=3, additions=ADDITIONS) -> GPT:
    "The same weights, none of them zero, in another format."
    model = GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=n_layer, n_head=2, n_kv_head=1,
                          n_embd=128, **additions)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=p.size(-1) ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
    if name == "float64":
        model.double()
    if name == "fp8":
        use_fp8(model, emulate=True)
    model.compute_dtype = torch.bfloat16 if name == "fp8" else getattr(torch, name)
    return model


def parts(model, compiled=None) -> dict[str, dict]:
    "Every block's output, the loss, and every gradient; single numbers together as one vector."
    outputs = {}
    hooks = [block.register_forward_hook(lambda block, x, y, i=i: outputs.__setitem__(i, y))
             for i, block in enumerate(model.transformer.h)]
    idx = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(2))
    loss = (model if compiled is None else compiled)(idx[:, :-1], idx[:, 1:])
    (loss * 256).backward()                    # in fp16 small gradients would be flushed
    for hook in hooks:
        hook.remove()
    grads = {name: p.grad.double() / 256 for name, p in model.named_parameters()}
    numbers = [name for name, grad in grads.items() if grad.numel() == 1]
    if numbers:                                # of one alone, the terms may cancel to nearly 0
        grads["numbers"] = torch.cat([grads.pop(name) for name in numbers])
    return {"outputs": {i: y.detach().double() for i, y in outputs.items()} | {
        "loss": loss.detach().double()}, "grads": grads}


def errors(ours, theirs) -> dict[str, float]:
    "‖a − b‖ / ‖b‖ of each."
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    return {name: ((ours[name] - b).norm() / b.norm()).item() for name, b in theirs.items()}


@pytest.fixture(scope="module")
def exact_parts():
    return parts(model_in("float64"))


@pytest.mark.parametrize("name", LIMITS)
def test_every_layer_and_gradient_in_every_format(name, exact_parts):
    "Against fp64. In bf16 one block is right to 0.6%; a gradient has been rounded far more often."
    made = parts(model_in(name))
    for what, limit in zip(("outputs", "grads"), LIMITS[name], strict=True):
        found = errors(made[what], exact_parts[what])
        worst = max(found, key=found.get)
        assert found[worst] < limit, f"{what}: {worst} is off by {found[worst]:.1e}"
        assert found[worst] > limit / 10, f"{what}: is that {name}? {worst}: {found[worst]:.1e}"


@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_in_bf16():
    "What the compiler fuses it rounds less often: it is no further from fp64 than the eager pass."
    exact, eager = (parts(model_in(name, 1, {})) for name in ("float64", "bfloat16"))
    model = model_in("bfloat16", 1, {})                # plain: compiling each addition takes seconds
    torch._dynamo.reset()
    compiled = parts(model, torch.compile(model, fullgraph=True))
    for what, limit in (("outputs", 0.01), ("grads", 0.04)):
        for reference in (exact, eager):
            found = errors(compiled[what], reference[what])
            worst = max(found, key=found.get)
            assert found[worst] < limit, f"{what}: {worst} is off by {found[worst]:.1e}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"golden": make_golden, "checkpoint": make_checkpoint,
     "losses": lambda: print(json.dumps(fifty_steps().tolist()))}[sys.argv[1]]()
