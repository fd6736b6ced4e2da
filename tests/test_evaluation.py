"CORE: prompts token by token, the few-shot pool, equal scores for any batch size and number of ranks."
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nanochat_nb.common import UserError
from nanochat_nb.evaluation import (CORE_LABELS, Question, answer, batches_by_length, centered, common_prefix,
                                    evaluate_core, few_shot_indices, load_core_tasks, make_question, render_prompts,
                                    score_task, task_questions)
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
TEST_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", "/nonexistent"))
real_core = pytest.mark.skipif(not (TEST_DATA / "core").is_dir(), reason="NANOCHAT_TEST_DATA is not set")

MC = [{"query": f"Question {i}:", "choices": ["yes indeed", "no", f"maybe {i}"], "gold": i % 3} for i in range(14)]
SCHEMA = [{"context_options": [f"The cat {i} sat because the cat", f"The cat {i} sat because the mat"],
           "continuation": "was warm.", "gold": i % 2} for i in range(9)]
LM = [{"context": f"The number after {i} is ", "continuation": f"{i + 1} of course"} for i in range(11)]


def random_model(tokenizer, sequence_len=128, seed=0):
    "Random weights in every layer: an initialised GPT would answer every question alike."
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=tokenizer.vocab_size,
                          n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["\n\n".join(render_prompts(kind, items[i]) [-1] for i in range(9))
             for kind, items in (("multiple_choice", MC), ("schema", SCHEMA), ("language_modeling", LM))]
    return Tokenizer.train(texts * 3, 400)


@pytest.fixture(scope="module")
def core_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "core"
    (folder / "eval_data" / "sub").mkdir(parents=True)
    entries = []
    for label, kind, items, shots, extra in [
            ("pick", "multiple_choice", MC, 3, {"continuation_delimiter": "\nAnswer: "}),
            ("riddle", "schema", SCHEMA, 0, {}), ("write", "language_modeling", LM, 2, {})]:
        path = folder / "eval_data" / "sub" / f"{label}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        entries.append({"label": label, "dataset_uri": f"sub/{label}.jsonl", "num_fewshot": [shots],
                        "icl_task_type": kind, **extra})
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Task Type,Random baseline\n"
                                               "pick,x,33.3\nriddle,x,50\nwrite,\"a, b\",0\n")
    return folder


def test_prompts():
    shots = [MC[1], MC[2]]
    assert render_prompts("multiple_choice", MC[5], shots, "\nAnswer: ") == [
        "Question 1:\nAnswer: no\n\nQuestion 2:\nAnswer: maybe 2\n\nQuestion 5:\nAnswer: " + choice
        for choice in ("yes indeed", "no", "maybe 5")]
    assert render_prompts("schema", SCHEMA[0], SCHEMA[1:2]) == [
        "The cat 1 sat because the mat was warm.\n\nThe cat 0 sat because the cat was warm.",
        "The cat 1 sat because the mat was warm.\n\nThe cat 0 sat because the mat was warm."]
    assert render_prompts("language_modeling", LM[3], LM[:1]) == [
        "The number after 0 is 1 of course\n\nThe number after 3 is",
        "The number after 0 is 1 of course\n\nThe number after 3 is 4 of course"]


def scored_text(tokenizer, question):
    return [tokenizer.decode(row[start:]) for row, start in zip(question.rows, question.starts)]


def test_scored_tokens(tokenizer):
    def ask(kind, item, shots=()):
        rows = tokenizer.encode_batch(render_prompts(kind, item, shots))
        return make_question(kind, rows, item.get("gold"), tokenizer.bos, 512)
    assert scored_text(tokenizer, ask("multiple_choice", MC[4], MC[:2])) == [" yes indeed", " no", " maybe 4"]
    assert scored_text(tokenizer, ask("schema", SCHEMA[0], SCHEMA[3:5])) == [" was warm."] * 2
    question = ask("language_modeling", LM[3], LM[:2])
    assert scored_text(tokenizer, question) == [" 4 of course"] and question.gold is None
    assert question.rows[0] == [tokenizer.bos, *tokenizer.encode(
        "The number after 0 is 1 of course\n\nThe number after 1 is 2 of course\n\nThe number after 3 is 4 of course")]


def test_spans_by_hand():
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2 and common_prefix([[1], [2]]) == 0 and common_prefix([[1, 2]]) == 2
    q = make_question("multiple_choice", [[5, 6], [5, 6, 7]], 1, 0, 10)       # one answer begins the other
    assert q == Question([[0, 5, 6], [0, 5, 6, 7]], [2, 2], 1)
    assert make_question("multiple_choice", [[5, 6], [5, 6]], 0, 0, 10).starts == [2, 2]
    long = list(range(1, 101))
    q = make_question("multiple_choice", [long + [200], long + [201, 202]], 0, 0, 16)
    assert q.rows == [[0, *range(87, 101), 200], [0, *range(87, 101), 201, 202]] and q.starts == [15, 15]
    q = make_question("language_modeling", [long, long + [200, 201]], None, 0, 16)
    assert q == Question([[0, *range(87, 101), 200, 201]], [15], None)
    q = make_question("schema", [long + [7, 8, 9], [1, 2, 7, 8, 9]], 0, 0, 16)  # one row is far shorter than what is cut
    assert all(1 <= s < len(row) <= 17 for row, s in zip(q.rows, q.starts))
    q = make_question("language_modeling", [[5], [5, *long]], None, 0, 16)      # the answer alone is too long
    assert q.starts == [1] and len(q.rows[0]) == 17


def test_few_shots_are_nanochats():
    for n, idx, k in [(5, 0, 2), (500, 499, 10), (20, 7, 10)]:
        expected = random.Random(1234 + idx).sample([i for i in range(n) if i != idx], k)
        assert few_shot_indices(n, idx, k) == expected and idx not in expected


def test_fewer_questions_keep_the_examples(tokenizer, core_dir):
    task = load_core_tasks(core_dir)[0]
    shuffled = [dict(item) for item in MC]
    random.Random(1337).shuffle(shuffled)
    assert task.items == shuffled and task.delimiter == "\nAnswer: " and math.isclose(task.baseline, 0.333)
    _, everything = task_questions(task, tokenizer, 512)
    numbers, few = task_questions(task, tokenizer, 512, max_per_task=4)
    assert numbers == [0, 1, 2, 3] and few == everything[:4] and len(everything) == 14
    shots = [shuffled[i] for i in few_shot_indices(14, 2, 3)]
    expected = render_prompts("multiple_choice", shuffled[2], shots, "\nAnswer: ")
    assert [tokenizer.decode(row[1:]) for row in few[2].rows] == expected
    parts = [task_questions(task, tokenizer, 512, 7, rank, 3) for rank in range(3)]
    assert sorted(i for numbers, _ in parts for i in numbers) == list(range(7))


@torch.inference_mode()
def answer_naive(model, question):
    losses, exact = [], []
    for row, start in zip(question.rows, question.starts):
        logits = model(torch.tensor([row[:-1]]))[0, start - 1:]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[start:])).item())
        exact.append(bool((logits.argmax(-1) == torch.tensor(row[start:])).all()))
    return exact[0] if question.gold is None else losses.index(min(losses)) == question.gold


@pytest.mark.parametrize("sequence_len", [128, 24])     # 24: most prompts are cut
def test_batches_equal_one_at_a_time(tokenizer, core_dir, sequence_len):
    model, seen = random_model(tokenizer, sequence_len), set()
    for task in load_core_tasks(core_dir):
        _, questions = task_questions(task, tokenizer, sequence_len)
        if task.kind == "language_modeling":            # make the model right about some
            with torch.inference_mode():
                for q in questions[::2]:
                    best = model(torch.tensor([q.rows[0][:-1]]))[0].argmax(-1)
                    q.rows[0][-1], q.starts[0] = int(best[-1]), len(q.rows[0]) - 1
        expected = [answer_naive(model, q) for q in questions]
        seen |= {(task.kind, right) for right in expected}
        assert answer(model, questions) == expected
        for max_rows in (1, 5, 64):
            batches = batches_by_length(questions, max_rows, 400)
            assert sorted(i for batch in batches for i in batch) == list(range(len(questions)))
            got = dict(pair for batch in batches for pair in zip(batch, answer(model, [questions[i] for i in batch])))
            assert [got[i] for i in range(len(questions))] == expected
    assert len(seen) == 6                               # each kind had right and wrong answers


def test_scores(tokenizer, core_dir):
    model = random_model(tokenizer)
    result = evaluate_core(model, tokenizer, core_dir)
    assert evaluate_core(model, tokenizer, core_dir, max_rows=1) == result
    assert result["name"] == f"CORE-style ({core_dir.parent.name})" and result["core"]["n"] == 14 + 9 + 11
    variance = 0
    for task in load_core_tasks(core_dir):
        r = result["tasks"][task.label]
        shares = [score_task(model, tokenizer, task, rank=rank, world_size=2) for rank in range(2)]
        assert torch.equal(sum(shares), score_task(model, tokenizer, task))
        assert r["accuracy"]["value"] == pytest.approx(sum(shares).mean().item())
        assert r["centered"] == pytest.approx(centered(r["accuracy"]["value"], task.baseline))
        variance += (r["accuracy"]["stderr"] / (1 - task.baseline)) ** 2
    assert result["core"]["stderr"] == pytest.approx(variance ** 0.5 / 3)
    assert result["core"]["value"] == pytest.approx(sum(r["centered"] for r in result["tasks"].values()) / 3)
    assert centered(0.25, 0.25) == 0 and centered(1, 0.25) == 1
    with pytest.raises(UserError, match="no questions"):
        evaluate_core(model, tokenizer, core_dir, max_per_task=0)


TWO_RANKS = """
import json, sys
import torch
from nanochat_nb.common import compute_cleanup, compute_init
from nanochat_nb.evaluation import evaluate_core
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer
torch.set_num_threads(1)
folder, core_dir = sys.argv[1:]
compute = compute_init("cpu")
tokenizer = Tokenizer.load(folder)
model = GPT(GPTConfig(**json.load(open(folder + "/config.json"))))
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True), strict=False)
result = evaluate_core(model, tokenizer, core_dir, rank=compute.rank, world_size=compute.world_size)
open(f"{folder}/result{compute.rank}.json", "w").write(json.dumps(result))
compute_cleanup()
"""


def test_two_processes_agree_with_one(tokenizer, core_dir, tmp_path):
    model = random_model(tokenizer)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(tmp_path / "two.py"), str(tmp_path), str(core_dir)], check=True, timeout=300)
    expected = evaluate_core(model, tokenizer, core_dir)
    for rank in range(2):
        assert json.loads((tmp_path / f"result{rank}.json").read_text()) == expected


def test_broken_folders(tokenizer, core_dir, tmp_path):
    with pytest.raises(UserError, match="no core.yaml"):
        load_core_tasks(tmp_path)

    def broken(change):
        import shutil
        shutil.rmtree(tmp_path / "core", ignore_errors=True)
        shutil.copytree(core_dir, tmp_path / "core")
        change(tmp_path / "core")
        return tmp_path / "core"

    data = "eval_data/sub/pick.jsonl"
    for change, message in [
            (lambda d: (d / data).unlink(), "pick.jsonl, which is not there"),
            (lambda d: (d / data).write_text('{"query": "x", "gold": 0}\n'), "line 1 lacks choices"),
            (lambda d: (d / data).write_text("not json\n"), "line 1 is not a JSON object"),
            (lambda d: (d / data).write_text(json.dumps(MC[0]) + "\n"), "too few"),
            (lambda d: (d / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n"), "no row for task pick"),
            (lambda d: (d / "core.yaml").write_text((d / "core.yaml").read_text().replace("schema", "essay")), "essay")]:
        with pytest.raises(UserError, match=message):
            load_core_tasks(broken(change))


@real_core
def test_the_22_tasks():
    tasks = {task.label: task for task in load_core_tasks(TEST_DATA / "core")}
    assert set(tasks) == CORE_LABELS
    tokenizer = Tokenizer.train([json.dumps(t.items[0]) for t in tasks.values()] * 2, 600)
    model = random_model(tokenizer, 512)
    result = evaluate_core(model, tokenizer, TEST_DATA / "core", max_per_task=1)
    assert result["name"] == "CORE" and result["core"]["n"] == 22

    arc = tasks["arc_easy"]
    _, (question,) = task_questions(arc, tokenizer, 10**6, max_per_task=1)
    text = tokenizer.decode(question.rows[question.gold][1:])
    assert text.count("\nAnswer: ") == 11 and text.count("\n\n") >= 10
    assert text.endswith(f"{arc.items[0]['query']}\nAnswer: {arc.items[0]['choices'][arc.items[0]['gold']]}")

    _, (question,) = task_questions(tasks["winograd"], tokenizer, 10**6, max_per_task=1)
    assert scored_text(tokenizer, question) == [" " + tasks["winograd"].items[0]["continuation"]] * 2

    _, (question,) = task_questions(tasks["lambada_openai"], tokenizer, 10**6, max_per_task=1)
    item = tasks["lambada_openai"].items[0]
    assert scored_text(tokenizer, question) == [" " + item["continuation"]]


@real_core
def test_real_tasks_in_batches_of_1_and_64():
    tasks = [t for t in load_core_tasks(TEST_DATA / "core") if t.label in ("copa", "winograd", "bigbench_operators")]
    tokenizer = Tokenizer.train([json.dumps(item) for t in tasks for item in t.items[:40]], 800)
    model = random_model(tokenizer, 256)
    for task in tasks:
        one = score_task(model, tokenizer, task, 30, max_rows=1)
        assert torch.equal(one, score_task(model, tokenizer, task, 30, max_rows=64))
