"""How fast the pocket model (depth 4) trains here, against its plain textbook form: `python bench/training_speed.py`.

The textbook form is the same function of the same weights, written as the formulas stand: fp32, scores
as a T × T matrix, all logits at once, and PyTorch's optimizers going from parameter to parameter. All
variants take turns, so that a machine whose speed drifts treats them alike.
"""
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanochat_nb.attention import attention_naive
from nanochat_nb.common import Compute
from nanochat_nb.gpt import GPT, norm, rotate
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.pretraining import peak_flops, train_step
from nanochat_nb.scaling import config_for_depth

B, T, VOCAB, STEPS, ROUNDS = 16, 256, 4096, 3, 6      # one micro-batch of 4,096 tokens a step
CHUNK = 512                                           # tokens whose logits are held at a time
VARIANTS = {                                          # dtype, compiled, chunk_tokens
    "textbook": None,
    "fp32": (torch.float32, False, 0),
    "bf16": (torch.bfloat16, False, 0),
    "bf16, loss in chunks": (torch.bfloat16, False, CHUNK),
    "fp32, compiled": (torch.float32, True, 0),
    "bf16, compiled": (torch.bfloat16, True, 0),
    "bf16, compiled, loss in chunks": (torch.bfloat16, True, CHUNK),
}


def textbook_loss(model: GPT, idx, targets):
    "The plain model's mean loss, line by line as in a textbook."
    cos, sin = model.cos[:T], model.sin[:T]
    x = norm(model.transformer.wte(idx))
    for block in model.transformer.h:
        a = norm(x)
        q, k, v = (F.linear(a, c.weight).view(B, T, -1, model.config.head_dim).transpose(1, 2)
                   for c in (block.attn.c_q, block.attn.c_k, block.attn.c_v))
        y = attention_naive(norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin)), v)
        x = x + F.linear(y.transpose(1, 2).flatten(2), block.attn.c_proj.weight)
        x = x + F.linear(F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
    logits = 15 * torch.tanh(F.linear(norm(x), model.lm_head.weight) / 15)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def textbook():
    "A step of the textbook form; matrices to Muon, the rest to AdamW, one parameter after the other."
    model = GPT(config_for_depth(4, VOCAB, T)).init_weights(0)
    matrices = list(model.transformer.h.parameters())
    tables = [model.transformer.wte.weight, model.lm_head.weight]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
                  torch.optim.AdamW(tables, lr=0.003, betas=(0.8, 0.95), weight_decay=0.0, foreach=False)]

    def step(inputs, targets):
        loss = textbook_loss(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def ours(dtype: torch.dtype, compiled: bool, chunk_tokens: int):
    "A step of the library's trainer."
    model = GPT(config_for_depth(4, VOCAB, T)).init_weights(0)
    model.compute_dtype, model.chunk_tokens = dtype, chunk_tokens
    optimizer = setup_optimizer(model)
    step_model = torch.compile(model) if compiled else model
    return lambda inputs, targets: train_step(step_model, optimizer, [(inputs, targets)])[0]


def batch():
    idx = torch.randint(VOCAB, (B, T + 1))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def check_same_function() -> None:
    "The textbook form is the same model: the same loss, for weights that are not those of the start."
    model = GPT(config_for_depth(4, VOCAB, T)).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05)
        idx, targets = batch()
        torch.testing.assert_close(textbook_loss(model, idx, targets), model(idx, targets))


def main() -> None:
    torch.manual_seed(0)
    check_same_function()
    peaks = {str(d)[6:]: peak_flops(Compute(torch.device("cpu"), d)) for d in (torch.float32, torch.bfloat16)}
    steps, first, times = {}, {}, {name: [] for name in VARIANTS}
    for name, settings in VARIANTS.items():
        steps[name] = ours(*settings) if settings else textbook()
        start = time.perf_counter()
        steps[name](*batch())
        first[name] = time.perf_counter() - start
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step(*batch())
            times[name].append((time.perf_counter() - start) / STEPS)
    flops = GPT(config_for_depth(4, VOCAB, T)).flops_per_token() * B * T
    rows = []
    for name, settings in VARIANTS.items():
        ratios = [a / b for a, b in zip(times["textbook"], times[name])]     # of the same round
        peak = peaks[str(settings[0])[6:] if settings else "float32"]
        rows.append({"variant": name, "tokens_per_second": round(B * T / min(times[name])),
                     "ratio_to_textbook": round(statistics.median(ratios), 2),
                     "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                     "share_of_matmul_peak": round(flops / min(times[name]) / peak, 2),
                     "first_step_seconds": round(first[name], 1)})
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    result = {"what": "training step of depth 4, 4,096 tokens, sequence 256, vocabulary 4,096, optimizer included; "
                      "ratio: median over rounds in which all variants took turns",
              "hardware": f"{os.cpu_count()} × {cpu}", "torch": torch.__version__.split("+")[0],
              "date": time.strftime("%Y-%m-%d"), "matmul_peak_gflops": {k: round(v / 1e9) for k, v in peaks.items()},
              "variants": rows}
    path = Path(__file__).parent / "results" / "training_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
