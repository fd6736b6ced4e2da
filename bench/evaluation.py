"""How fast are the tasks of CORE scored, and are the verdicts the same? `python bench/evaluation.py --data_dir DIR`.

Three ways, on the same questions of all 22 tasks with the same depth-6 model, in turns: one row at a time, and one
question at a time with its rows padded to one batch (as nanochat's core_eval does), both with the logits and losses
of every position; and ours: shared beginnings once, batches of similar length, logits of scored tokens only.
The model reads for some steps first (--steps), so that its answers are not noise. Three to four minutes on two cores.
"""
import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat_nb.common import keep_freed_memory
from nanochat_nb.dataset import Documents
from nanochat_nb.evaluation import load_core_tasks, task_questions
from nanochat_nb.gpt import GPT
from nanochat_nb.scaling import additions, config_for_depth
from nanochat_nb.scoring import credit, score_questions
from nanochat_nb.tokenizer import Tokenizer

VOCAB_SIZE, TRAIN_CHARS = 32768, 6_000_000


@torch.inference_mode()
def plain_rows(model, rows, starts):
    "Mean losses and greedy matches of some rows in one padded batch; logits and losses of every position."
    T = max(map(len, rows))
    idx = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    logits = model(idx[:, :-1])                                                       # (rows, T − 1, V)
    losses = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    predicted, out = logits.argmax(-1), []
    for r, (row, start) in enumerate(zip(rows, starts)):
        span = slice(start - 1, len(row) - 1)
        out.append((losses[r, span].mean().item(), bool((predicted[r, span] == idx[r, start:len(row)]).all())))
    return out


def verdict(question, scores):
    losses = [loss for loss, _ in scores]
    return float(scores[0][1] if question.gold is None else losses.index(min(losses)) == question.gold)


def row_at_a_time(model, questions):
    return [[plain_rows(model, [row], [start])[0] for row, start in zip(q.rows, q.starts)] for q in questions]


def question_at_a_time(model, questions):
    return [plain_rows(model, q.rows, q.starts) for q in questions]


def train(model, documents, tokenizer, steps, T=256, B=4):
    "A short look at real text with AdamW."
    ids = [i for text in documents[:3000] for i in [tokenizer.bos, *tokenizer.encode(text)]]
    data = torch.tensor(ids)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(data) - T - 1, (B,), generator=generator)
        batch = torch.stack([data[i:i + T + 1] for i in at])
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        adamw.step()
        adamw.zero_grad()
    return loss.item() if steps else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default=os.environ.get("NANOCHAT_TEST_DATA"), help="folder with core/ and text")
    parser.add_argument("--questions", type=int, default=4, help="of each task")
    parser.add_argument("--rounds", type=int, default=1, help="turns of the three ways")
    parser.add_argument("--steps", type=int, default=20, help="of training before")
    parser.add_argument("--sequence_len", type=int, default=2048)
    parser.add_argument("--output", default=Path(__file__).parent / "results" / "evaluation.json", type=Path)
    args = parser.parse_args()
    if not args.data_dir:
        parser.error("--data_dir: a folder with core/core.yaml and text is needed")
    keep_freed_memory()
    documents = Documents(args.data_dir)
    sample, chars = [], 0
    while chars < TRAIN_CHARS and len(sample) < len(documents):
        sample.append(documents[len(sample)])
        chars += len(sample[-1])
    tokenizer = Tokenizer.train(sample, VOCAB_SIZE)
    config = config_for_depth(6, tokenizer.vocab_size, args.sequence_len, **additions())
    model = GPT(config).init_weights(seed=0)
    started = time.time()
    loss = train(model, sample, tokenizer, args.steps)
    print(f"{args.steps} steps in {time.time() - started:.0f} s, loss {loss}", flush=True)

    ways = {"row_at_a_time": row_at_a_time, "question_at_a_time": question_at_a_time, "ours": score_questions}
    seconds, counts, tokens = {}, {}, {}
    agree = {"questions": 0, "equal_verdicts": 0, "largest_difference_nats": 0.0, "smallest_gap_nats": float("inf")}
    tokenizing = 0.0
    for task in load_core_tasks(Path(args.data_dir) / "core"):
        start = time.perf_counter()
        _, questions = task_questions(task, tokenizer, config.sequence_len, args.questions)
        tokenizing += time.perf_counter() - start
        counts[task.kind] = counts.get(task.kind, 0) + len(questions)
        tokens[task.kind] = tokens.get(task.kind, 0) + sum(len(row) for q in questions for row in q.rows)
        found, taken = {}, {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way(model, questions)
                taken[name].append(time.perf_counter() - start)
        for name, times in taken.items():
            seconds[task.kind, name] = seconds.get((task.kind, name), 0) + min(times)
        print(f"{task.label:34} {len(questions):3}  " + "  ".join(f"{name} {min(t):6.2f} s" for name, t in taken.items()), flush=True)
        for q, plain, scores in zip(questions, found["row_at_a_time"], found["ours"]):
            means = [s.loss / (len(row) - start) for s, row, start in zip(scores, q.rows, q.starts)]
            agree["questions"] += 1
            agree["equal_verdicts"] += verdict(q, plain) == credit(q, scores)
            agree["largest_difference_nats"] = max([agree["largest_difference_nats"],
                                                    *(abs(a - b) for a, (b, _) in zip(means, plain))])
            if q.gold is not None:
                agree["smallest_gap_nats"] = min(agree["smallest_gap_nats"], sorted(means)[1] - sorted(means)[0])
    rows = []
    for kind in [*counts, "all"]:
        kinds = list(counts) if kind == "all" else [kind]
        n, times = sum(counts[k] for k in kinds), {name: sum(seconds[k, name] for k in kinds) for name in ways}
        rows.append({"kind": kind, "questions": n, "tokens_in_rows": sum(tokens[k] for k in kinds),
                     **{name: round(n / t, 3) for name, t in times.items()},
                     "ratio_to_rows": round(times["row_at_a_time"] / times["ours"], 2),
                     "ratio_to_questions": round(times["question_at_a_time"] / times["ours"], 2)})
        print(json.dumps(rows[-1]))
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    agree["largest_difference_nats"] = float(f"{agree['largest_difference_nats']:.2g}")
    agree["smallest_gap_nats"] = float(f"{agree['smallest_gap_nats']:.2g}")
    result = {"what": "questions of the 22 CORE tasks scored per second: plain, with all logits, one row or one question at "
                      "a time; ours. Depth 6 with default additions, fp32; ways in turns",
              "hardware": f"{os.cpu_count()} × {cpu}", "threads": torch.get_num_threads(),
              "torch": torch.__version__.split("+")[0], "date": time.strftime("%Y-%m-%d"), "vocab_size": tokenizer.vocab_size,
              "sequence_len": config.sequence_len, "training_steps": args.steps, "questions_per_task": args.questions,
              "rounds": args.rounds, "seconds_of_rendering_and_tokenizing": round(tokenizing, 2), "rows": rows, "agreement": agree}
    print(json.dumps(agree))
    args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
