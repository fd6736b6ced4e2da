"""How fast tokens come out of the engine on this CPU, beside plainer ways: `python bench/engine.py`.

Depth 6, vocabulary 4,096, prompts of 128 tokens, 128 new ones, greedy; one request, and 32 at once. Each
way lives in a process of its own with all cores, and they take turns; ratios are taken within a round.
`plain` is the model of lesson 3 with a cache that grows by concatenation, fp32 and eager; `transformers`
runs the exported model as its `generate` does. Both write the engine's tokens, which is checked.

The floor of a step is what it must read, all matrices once and what the cache holds, over the bandwidth
of a sum of 256 MB, measured in each round.
"""
import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

DEPTH, VOCAB, T, PROMPT, NEW = 6, 4096, 512, 128, 128
BATCHES = (1, 32)
WAYS = {  # additions to the model, weights of the engine; None: not the engine
    "plain": ("none", None),
    "transformers": ("none", None),
    "engine": ("none", ""),
    "engine, int8": ("none", "int8"),
    "engine, int4": ("none", "int4"),
    "engine, default additions": (None, ""),
}


def make_model(extras: str | None):
    "Random weights in every matrix, so that no token is like another; the dtype that this machine takes."
    import torch
    from nanochat_nb.common import compute_init
    from nanochat_nb.gpt import GPT
    from nanochat_nb.scaling import DEFAULT_EXTRAS, additions, config_for_depth
    compute = compute_init("cpu")
    model = GPT(config_for_depth(DEPTH, VOCAB, T, **additions(DEFAULT_EXTRAS if extras is None else extras)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, p.size(1) ** -0.5, generator=generator)
    model.compute_dtype = compute.dtype
    return model.requires_grad_(False)


def prompts(batch: int) -> list[list[int]]:
    import torch
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(VOCAB, (batch, PROMPT), generator=generator).tolist()


def plain(model):
    "A generator as one writes it first: fp32, one operation after the other, a cache by concatenation."
    import torch
    import torch.nn.functional as F
    from nanochat_nb.gpt import norm, rotate
    D = model.config.head_dim

    def forward(idx, caches):
        past = caches[0][0].size(2) if caches[0] else 0
        cos, sin = model.cos[past:past + idx.size(1)], model.sin[past:past + idx.size(1)]
        x = norm(model.transformer.wte(idx))
        for layer, block in enumerate(model.transformer.h):
            a = norm(x)
            q, k, v = (F.linear(a, c.weight).view(*idx.shape, -1, D).transpose(1, 2)
                       for c in (block.attn.c_q, block.attn.c_k, block.attn.c_v))
            q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
            if caches[layer]:
                k, v = torch.cat([caches[layer][0], k], 2), torch.cat([caches[layer][1], v], 2)
            caches[layer] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=idx.size(1) > 1)
            x = x + F.linear(y.transpose(1, 2).flatten(2), block.attn.c_proj.weight)
            h = F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square()
            x = x + F.linear(h, block.mlp.c_proj.weight)
        return 15 * (F.linear(norm(x), model.lm_head.weight) / 15).tanh()

    @torch.inference_mode()
    def write(asked: list[list[int]], new: int) -> list[list[int]]:
        caches, idx, out = [None] * model.config.n_layer, torch.tensor(asked), []
        for _ in range(new):
            idx = forward(idx, caches)[:, -1:].argmax(-1)
            out.append(idx)
        return torch.cat(out, 1).tolist()

    return write


def with_transformers(model):
    import torch
    import transformers
    from nanochat_nb.export import hf_config, hf_weights
    config = hf_config(model.config, some_tokenizer())
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    peer.load_state_dict(hf_weights(model))
    peer = peer.float().eval()
    peer.generation_config.eos_token_id = None                     # all 128 tokens, whatever they are

    @torch.inference_mode()
    def write(asked: list[list[int]], new: int) -> list[list[int]]:
        idx = torch.tensor(asked)
        done = peer.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=new)
        return done[:, PROMPT:].tolist()

    return write


def some_tokenizer():
    "A vocabulary of the model's size, of words that do not exist."
    from nanochat_nb.tokenizer import Tokenizer
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    tokenizer = Tokenizer.train([" ".join(rng.choices(words, k=200)) for _ in range(300)], VOCAB)
    assert tokenizer.vocab_size == VOCAB
    return tokenizer


def with_engine(model, weights: str):
    from nanochat_nb.engine import Engine
    engine = Engine(model, some_tokenizer(), weights=weights)

    def write(asked: list[list[int]], new: int) -> list[list[int]]:
        return [c.tokens for c in engine.generate(asked, new, temperature=0, stop_ids=[])]

    return write


def bytes_per_step(model, weights: str | None, batch: int) -> int:
    "Matrices, and the cache when it holds the prompt and half of the answer."
    from nanochat_nb.quantization import matrix_bytes, pack
    c = model.config
    matrices = matrix_bytes(model) if weights is None else matrix_bytes(pack(model, weights))
    return matrices + batch * (PROMPT + NEW // 2) * 2 * c.n_layer * c.n_kv_head * c.head_dim * (
        2 if weights is not None and str(model.compute_dtype) == "torch.bfloat16" else 4)


def bandwidth() -> float:
    "Bytes per second of reading memory on all cores."
    import torch
    a, best = torch.ones(2**26), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a.sum()
        best = min(best, time.perf_counter() - start)
    return a.nbytes / best


def work(name: str) -> None:
    "One way, in a process of its own: a batch size on stdin asks for a run, its figures go to stdout."
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    extras, weights = WAYS[name]
    model = make_model(extras)
    write = (with_engine(model, weights) if weights is not None else
             with_transformers(model) if name == "transformers" else plain(model))
    for batch in BATCHES:
        write(prompts(batch), 4)                                   # warm
    print(json.dumps({str(b): bytes_per_step(model, weights, b) for b in BATCHES}), file=say, flush=True)
    for line in sys.stdin:
        asked, times = prompts(int(line)), []
        for new in (1, NEW):
            start = time.perf_counter()
            tokens = write(asked, new)
            times.append(time.perf_counter() - start)
        print(json.dumps({"first": times[0], "all": times[1], "tokens": tokens}), file=say, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    workers = {name: subprocess.Popen([sys.executable, __file__, "--work", name], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True) for name in args.ways}
    sizes = {name: json.loads(worker.stdout.readline()) for name, worker in workers.items()}
    runs = {(name, b): [] for b in BATCHES for name in args.ways}
    reads = []
    for i in range(args.rounds):
        reads.append(bandwidth())
        for batch in BATCHES:
            for name, worker in workers.items():
                worker.stdin.write(f"{batch}\n")
                worker.stdin.flush()
                runs[name, batch].append(json.loads(worker.stdout.readline()))
        print(f"round {i + 1} of {args.rounds}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for (name, batch), made in runs.items():
        step_ms = [1e3 * (run["all"] - run["first"]) / (NEW - 1) for run in made]
        floor_ms = [1e3 * sizes[name][str(batch)] / read for read in reads]

        def ratio(other: str) -> float | None:
            beside = runs.get((other, batch))
            return beside and round(statistics.median(b["all"] / run["all"] for run, b in zip(made, beside)), 2)

        def step_ratio(other: str) -> float | None:
            beside = runs.get((other, batch))
            return beside and round(statistics.median((b["all"] - b["first"]) / (run["all"] - run["first"])
                                                      for run, b in zip(made, beside)), 2)

        same = [run["tokens"] == runs["engine", batch][0]["tokens"] for run in made] if "engine" in args.ways else []
        rows.append({"way": name, "batch": batch,
                     "tokens_per_second": round(batch * NEW / min(run["all"] for run in made)),
                     "step_ms": round(statistics.median(step_ms), 2),
                     "floor_ms": round(statistics.median(floor_ms), 2),
                     "step_over_floor": round(statistics.median(a / b for a, b in zip(step_ms, floor_ms)), 2),
                     "times_plain": ratio("plain"), "times_transformers": ratio("transformers"),
                     "step_times_plain": step_ratio("plain"),
                     "same_tokens_as_engine": all(same)})
        print(rows[-1], flush=True)
    for name in args.ways:
        one, many = (next(r for r in rows if (r["way"], r["batch"]) == (name, b)) for b in BATCHES)
        many["times_one_request"] = round(many["tokens_per_second"] / one["tokens_per_second"], 2)
    import torch
    from nanochat_nb.common import compute_dtype
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    path = Path(__file__).parent / "results" / "engine.json"
    machine = f"{os.cpu_count()} × {cpu}, {str(compute_dtype('cpu'))[6:]}"
    others = json.loads(path.read_text())["machines"] if path.exists() else []
    result = {"what": f"greedy generation at depth {DEPTH}, vocabulary {VOCAB:,}, {PROMPT} + {NEW} tokens; tokens per "
                      "second with the prefill, of the best round; a step's milliseconds without it, median; ratios of "
                      "the whole within a round, median",
              "machines": [m for m in others if m["hardware"] != machine] + [
                  {"hardware": machine, "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"),
                   "read_gb_per_second": round(statistics.median(reads) / 1e9, 1), "rows": rows}]}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
