"""How fast a training step is on this CPU, against its plain textbook form: `python bench/training_speed.py`.

Every form of the step lives in a process of its own, with all cores, and they take turns: while one
works the others wait at their pipe. So a machine whose speed drifts treats them alike, and ratios are
taken within a round. `--peer FOLDER` adds karpathy/nanochat from a clone in that folder, as it is: its
model of the same depth with its own rules, in fp32 (its choice on a CPU) and in bf16 (NANOCHAT_DTYPE).
Forms in bf16 are left out on a processor that does not multiply it. The JSON has one entry for each kind
of processor; a new run replaces its own.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

B, T, VOCAB, STEPS = 16, 512, 4096, 2                 # one micro-batch of 8,192 tokens a step
PEERS = {"nanochat 2026-07, fp32, compiled": "float32", "nanochat 2026-07, bf16, compiled": "bfloat16"}
# dtype, compiled, tokens whose logits are held at a time (0: all), additions of the default;
# None: textbook, or what pretraining chooses
FORMS = {
    "textbook, fp32": None,
    "fp32": ("float32", False, 0, ""),
    "fp32, compiled": ("float32", True, 0, ""),
    "fp32, compiled, loss in chunks": ("float32", True, 512, ""),
    "bf16": ("bfloat16", False, 0, ""),
    "bf16, loss in chunks": ("bfloat16", False, 512, ""),
    "bf16, compiled, loss in chunks": ("bfloat16", True, 512, ""),
    "as pretraining does it": (None, True, 512, None),
}


def textbook_loss(model, idx, targets):
    "The plain model's mean loss, line by line as in a textbook."
    import torch.nn.functional as F
    from nanochat_nb.attention import attention_naive
    from nanochat_nb.gpt import norm, rotate
    cos, sin = model.cos[:idx.size(1)], model.sin[:idx.size(1)]
    x = norm(model.transformer.wte(idx))
    for block in model.transformer.h:
        a = norm(x)
        q, k, v = (F.linear(a, c.weight).view(*idx.shape, -1, model.config.head_dim).transpose(1, 2)
                   for c in (block.attn.c_q, block.attn.c_k, block.attn.c_v))
        y = attention_naive(norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v)
        x = x + F.linear(y.transpose(1, 2).flatten(2), block.attn.c_proj.weight)
        x = x + F.linear(F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
    logits = 15 * (F.linear(norm(x), model.lm_head.weight) / 15).tanh()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def textbook(depth: int):
    "A step of the textbook form; matrices to Muon, the rest to AdamW, one parameter after the other."
    import torch
    from nanochat_nb.gpt import GPT
    from nanochat_nb.scaling import config_for_depth
    model = GPT(config_for_depth(depth, VOCAB, T)).init_weights(0)
    check_same_function(config_for_depth(2, 128, 32))
    tables = [model.transformer.wte.weight, model.lm_head.weight]
    optimizers = [torch.optim.Muon(list(model.transformer.h.parameters()), lr=0.02, weight_decay=0.0),
                  torch.optim.AdamW(tables, lr=0.003, betas=(0.8, 0.95), weight_decay=0.0, foreach=False)]

    def step(inputs, targets):
        loss = textbook_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step, model.flops_per_token(), torch.float32


def check_same_function(config) -> None:
    "The textbook form is the same model: the same loss, for weights that are not those of the start."
    import torch
    from nanochat_nb.gpt import GPT
    model = GPT(config).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05)
    idx = torch.randint(config.vocab_size, (2, config.sequence_len + 1))
    torch.testing.assert_close(textbook_loss(model, idx[:, :-1], idx[:, 1:]), model(idx[:, :-1], idx[:, 1:]))


def ours(depth: int, dtype: str | None, compiled: bool, chunk_tokens: int, extras: str | None):
    "A step of the library's trainer; None: the dtype and the additions that pretraining takes."
    import inspect

    import torch
    from nanochat_nb.common import compute_init
    from nanochat_nb.gpt import GPT
    from nanochat_nb.optimizer import setup_optimizer
    from nanochat_nb.pretraining import additions, pretrain, train_step
    from nanochat_nb.scaling import config_for_depth
    compute = compute_init("cpu")                      # as a run starts, its memory settings included
    if extras is None:
        extras = inspect.signature(pretrain).parameters["extras"].default
    model = GPT(config_for_depth(depth, VOCAB, T, **additions(extras))).init_weights(0)
    model.compute_dtype = getattr(torch, dtype) if dtype else compute.dtype
    model.chunk_tokens = chunk_tokens
    optimizer = setup_optimizer(model)
    step_model = torch.compile(model) if compiled else model

    def step(inputs, targets):
        return train_step(step_model, optimizer, [(inputs, targets)])[0]

    return step, model.flops_per_token(), model.compute_dtype


def peer(depth: int, dtype: str, folder: str):
    "A step of nanochat, as its scripts/base_train.py makes it."
    os.environ["NANOCHAT_DTYPE"] = dtype
    sys.path.insert(0, folder)
    import torch
    from nanochat.gpt import GPT, GPTConfig
    width = -(-64 * depth // 128) * 128                # its rule: 64 per block, heads of 128
    heads = width // 128
    with torch.device("meta"):
        original = GPT(GPTConfig(sequence_len=T, vocab_size=VOCAB, n_layer=depth, n_head=heads,
                                 n_kv_head=heads, n_embd=width, window_pattern="SSSL"))
    original.to_empty(device="cpu")
    original.init_weights()
    model = torch.compile(original, dynamic=False)
    optimizer = original.setup_optimizer(weight_decay=0.28)

    def step(inputs, targets):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step, original.estimate_flops(), getattr(torch, dtype)


def work(name: str, depth: int, folder: str) -> None:
    "One form, in a process of its own: a line on stdin asks for some steps, a line on stdout has the time."
    import torch
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                      # what libraries print must not be taken for an answer
    made = (peer(depth, PEERS[name], folder) if name in PEERS else
            ours(depth, *FORMS[name]) if FORMS[name] else textbook(depth))
    step, flops, dtype = made

    def batch():
        idx = torch.randint(VOCAB, (B, T + 1))
        return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    start = time.perf_counter()
    step(*batch())
    first = time.perf_counter() - start
    step(*batch())
    print(json.dumps({"first_step_seconds": first, "flops": flops, "dtype": str(dtype)[6:]}), file=say, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            step(*batch())
        print(json.dumps((time.perf_counter() - start) / STEPS), file=say, flush=True)


def has_bf16() -> bool:
    "Whether this processor multiplies bf16."
    from nanochat_nb.common import compute_dtype
    return str(compute_dtype("cpu")) == "torch.bfloat16"


def peak(dtype: str) -> float:
    "FLOP/s of a large matrix product, the best of several tries."
    import torch
    from nanochat_nb.common import Compute
    from nanochat_nb.pretraining import peak_flops
    return peak_flops(Compute(torch.device("cpu"), getattr(torch, dtype)))


def measure(depth: int, rounds: int, folder: str | None) -> list[dict]:
    "All forms in turn; a row for each."
    names = [name for name in [*FORMS, *(PEERS if folder else [])] if has_bf16() or "bf16" not in name]
    workers, about, times = {}, {}, {name: [] for name in names}
    peaks = {dtype: [] for dtype in ("float32", *["bfloat16"] * has_bf16())}
    for name in names:                                 # one after the other: compiling wants the machine too
        workers[name] = subprocess.Popen([sys.executable, __file__, "--work", name, "--depths", str(depth),
                                          "--peer", folder or ""],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        about[name] = json.loads(workers[name].stdout.readline())
        print(f"depth {depth}: {name}: first step {about[name]['first_step_seconds']:.0f} s", flush=True)
    for i in range(rounds):
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            times[name].append(json.loads(worker.stdout.readline()))
        for dtype in peaks:
            peaks[dtype].append(peak(dtype))
        print(f"depth {depth}: round {i + 1} of {rounds}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(times["textbook, fp32"], times[name])]       # of the same round
        share = B * T * about[name]["flops"] / min(times[name]) / max(peaks[about[name]["dtype"]])
        rows.append({"depth": depth, "form": name, "tokens_per_second": round(B * T / min(times[name])),
                     "ratio_to_textbook": round(statistics.median(ratios), 2),
                     "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                     "gflops_per_token": round(about[name]["flops"] / 1e9, 4),
                     "share_of_matmul_peak": round(share, 2),
                     "first_step_seconds": round(about[name]["first_step_seconds"], 1)})
        print(rows[-1], flush=True)
    rows.append({"depth": depth, "matmul_peak_gflops": {k: round(max(v) / 1e9) for k, v in peaks.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--peer", help="a clone of karpathy/nanochat, to take its turns too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.depths[0], args.peer)
    rows = [row for depth in args.depths for row in measure(depth, args.rounds, args.peer)]
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    import torch
    path = Path(__file__).parent / "results" / "training_speed.json"
    machine = f"{os.cpu_count()} × {cpu}, " + ("AVX512-BF16" if has_bf16() else "no bf16")
    others = json.loads(path.read_text())["machines"] if path.exists() else []
    result = {"what": f"training steps of {B * T:,} tokens, sequence {T}, vocabulary {VOCAB:,}, optimizer included; ratio: "
                      "median over rounds in which all forms took turns; share of peak: FLOPs of the model's own count "
                      "(attention at full length, windows at theirs) over the best matmul in the form's dtype",
              "machines": [m for m in others if m["hardware"] != machine] + [
                  {"hardware": machine, "torch": torch.__version__.split("+")[0],
                   "date": time.strftime("%Y-%m-%d"), "rows": rows}]}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
