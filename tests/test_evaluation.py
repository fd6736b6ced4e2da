"CORE: prompts token by token, equal verdicts for any batch size and number of ranks, errors that hold."
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.evaluation import (CORE_LABELS, centered, core_difference, evaluate_core, few_shot_indices,
                                    load_core_tasks, make_question, questions_needed, render_prompts, resampled_core,
                                    score_task, standard_error, task_questions)
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.scoring import (TIE, Question, RowScore, batches_by_length, common_prefix, credit, cut_left,
                                 score_questions, score_rows)
from nanochat_nb.tokenizer import Tokenizer, tokenizer_json

TEST_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", "/nonexistent"))
real_core = pytest.mark.skipif(not (TEST_DATA / "core").is_dir(), reason="NANOCHAT_TEST_DATA is not set")
pytestmark = pytest.mark.usefixtures("one_thread")

MC = [{"query": f"Question {i}:", "choices": ["yes indeed", "no", f"maybe {i}"], "gold": i % 3} for i in range(14)]
SCHEMA = [{"context_options": [f"The cat {i} sat because the cat", f"The cat {i} sat because the mat"],
           "continuation": "was warm.", "gold": i % 2} for i in range(9)]
LM = [{"context": f"The number after {i} is ", "continuation": f"{i + 1} of course"} for i in range(11)]


def random_model(vocab_size, sequence_len=128, seed=0, **changes):
    "Random weights in every layer: an initialised GPT would find all answers equally likely."
    model = GPT(GPTConfig(**{"sequence_len": sequence_len, "vocab_size": vocab_size, "n_layer": 2, "n_head": 2,
                             "n_kv_head": 2, "n_embd": 32, **changes}))
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
    for name, items in (("pick", MC), ("riddle", SCHEMA), ("write", LM)):
        path = folder / "eval_data" / "sub" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [
        {"label": label, "dataset_uri": f"sub/{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind, **extra}
        for label, name, kind, shots, extra in [
            ("pick", "pick", "multiple_choice", 3, {"continuation_delimiter": "\nAnswer: "}),
            ("riddle", "riddle", "schema", 0, {}), ("write", "write", "language_modeling", 2, {}),
            ("pick_zeroshot", "pick", "multiple_choice", 0, {})]]}))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Task Type,Random baseline\n"
                                               "pick,x,33.3\npick_zeroshot,x,33.3\nriddle,x,50\nwrite,\"a, b\",0\n")
    return folder


# ---------------------------------------------------------------- from items to tokens, ids written out

HAND = Tokenizer(tokenizer_json([bytes([b]) for b in range(256)] + [b" L", b"im", b"ima", b" Lima"]))
LIMA, BOS = 259, 260   # every other token is a byte


def ask(kind, item, shots=(), delimiter=" ", sequence_len=10**6):
    rows = HAND.encode_batch(render_prompts(kind, item, shots, delimiter))
    return make_question(kind, rows, item.get("gold"), HAND.bos, sequence_len)


def test_multiple_choice_by_hand():
    shot = {"query": "A", "choices": ["x", "Lima"], "gold": 1}
    item = {"query": "Go to", "choices": ["Lima", "Limax", "Oslo"], "gold": 2}
    before = [BOS, 65, LIMA, 10, 10, 71, 111, 32, 116, 111]                             # A Lima↵↵Go to
    question = ask("multiple_choice", item, [shot])
    assert question.rows == [before + [LIMA],                                           # _Lima
                             before + [LIMA, 120],                                      # _Lima x
                             before + [32, 79, 115, 108, 111]]                          # _ O s l o
    assert question.starts == [10, 10, 10] and question.gold == 2
    assert question.shared == 9                                         # the o of `to` predicts the first scored token
    question = ask("multiple_choice", {"query": "Q", "choices": ["a", "b"], "gold": 0}, delimiter="\nA: ")
    assert question.rows == [[BOS, 81, 10, 65, 58, 32, 97], [BOS, 81, 10, 65, 58, 32, 98]]
    assert question.starts == [6, 6]                                    # the delimiter is context


def test_schema_by_hand():
    item = {"context_options": ["Ann is", "Bo is"], "continuation": "in Lima", "gold": 1}
    shot = {"context_options": ["x", "y"], "continuation": "z", "gold": 0}
    question = ask("schema", item, [shot])
    assert question.rows == [[BOS, 120, 32, 122, 10, 10, 65, 110, 110, 32, 105, 115, 32, 105, 110, LIMA],
                             [BOS, 120, 32, 122, 10, 10, 66, 111, 32, 105, 115, 32, 105, 110, LIMA]]
    # what the rows have in common at the end, ` is` among it: as nanochat finds it
    assert question.starts == [9, 8] and question.gold == 1
    assert question.shared == 6


def test_language_modeling_by_hand():
    item = {"context": "Go to ", "continuation": "Lima"}                # the space at the end is stripped
    question = ask("language_modeling", item, [{"context": "A", "continuation": "b"}])
    assert question.rows == [[BOS, 65, 32, 98, 10, 10, 71, 111, 32, 116, 111, LIMA]]
    assert question.starts == [11] and question.gold is None and question.shared == 0
    question = ask("language_modeling", {"context": "Go to", "continuation": "Oslo"})
    assert question.rows == [[BOS, 71, 111, 32, 116, 111, 32, 79, 115, 108, 111]] and question.starts == [6]


def test_prompts_as_text():
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


def test_spans_in_corners():
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


TOKENS = st.lists(st.integers(1, 5), max_size=12)
ANSWERS = st.lists(TOKENS.filter(bool), min_size=2, max_size=4)


@given(before=TOKENS, answers=ANSWERS, sequence_len=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_spans_of_choices(before, answers, sequence_len):
    "Everything before a span is the same in all rows, and the whole difference is scored."
    whole = make_question("multiple_choice", [before + a for a in answers], 0, 0, 10**6)
    start = whole.starts[0]
    assert whole.starts == [start] * len(answers) and all(1 <= start < len(row) for row in whole.rows)
    assert len({tuple(row[:start]) for row in whole.rows}) == 1
    if len({a[0] for a in answers}) == len(answers):                    # no answer begins like another
        assert [row[start:] for row in whole.rows] == answers
    cut = make_question("multiple_choice", [before + a for a in answers], 0, 0, sequence_len)
    lost = max(0, max(map(len, whole.rows)) - sequence_len - 1)
    for row, full, s in zip(cut.rows, whole.rows, cut.starts):
        assert 1 <= s < len(row) <= sequence_len + 1 and s == max(1, start - lost)
        assert row[1:] == full[1 + lost:] or row == full[-2:]           # the end of the full row
        assert cut.shared < s


@given(before=TOKENS, options=ANSWERS, after=TOKENS.filter(bool))
@settings(max_examples=150, deadline=None)
def test_spans_of_schemas(before, options, after):
    "What is scored is the same in all rows, contains the continuation, and cannot be longer."
    q = make_question("schema", [before + o + after for o in options], 0, 0, 10**6)
    spans = [row[s:] for row, s in zip(q.rows, q.starts)]
    assert all(1 <= s < len(row) for row, s in zip(q.rows, q.starts)) and min(map(len, spans)) >= len(after)
    longest = max(map(len, spans))
    assert all(span == max(spans, key=len)[longest - len(span):] for span in spans)
    if len(set(map(tuple, options))) == len(options) and all(s > 1 for s in q.starts):
        assert len(set(map(tuple, spans))) == 1 and len({row[s - 1] for row, s in zip(q.rows, q.starts)}) > 1


@given(context=TOKENS, continuation=TOKENS.filter(bool))
@settings(max_examples=100, deadline=None)
def test_spans_of_writing(context, continuation):
    q = make_question("language_modeling", [context, context + continuation], None, 0, 10**6)
    assert q.rows == [[0, *context, *continuation]] and q.starts == [1 + len(context)]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_few_shot_draw(data):
    n = data.draw(st.integers(2, 300))
    idx, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, min(10, n - 1)))
    drawn = few_shot_indices(n, idx, k)
    assert len(set(drawn)) == k and idx not in drawn and all(0 <= i < n for i in drawn)
    assert drawn == random.Random(1234 + idx).sample([i for i in range(n) if i != idx], k)      # nanochat's draw


def test_few_shots_come_from_everywhere():
    counts = np.bincount([i for idx in range(400) for i in few_shot_indices(40, idx % 40, 10)], minlength=40)
    assert counts.min() > 0 and len({tuple(few_shot_indices(40, idx, 3)) for idx in range(40)}) == 40


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


# ---------------------------------------------------------------- scoring

@torch.inference_mode()
def rows_naive(model, question):
    "Summed loss and greedy match of each row, from all logits, one row at a time."
    scores = []
    for row, start in zip(question.rows, question.starts):
        logits, targets = model(torch.tensor([row[:-1]]))[0, start - 1:], torch.tensor(row[start:])
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        scores.append((loss, bool((logits.argmax(-1) == targets).all())))
    return scores


def answer_naive(model, question):
    means = [loss / (len(row) - start) for (loss, _), row, start in
             zip(rows_naive(model, question), question.rows, question.starts)]
    return rows_naive(model, question)[0][1] if question.gold is None else means.index(min(means)) == question.gold


@pytest.mark.parametrize("sequence_len", [128, 24])     # 24: most prompts are cut
def test_batches_equal_one_at_a_time(tokenizer, core_dir, sequence_len):
    model, seen = random_model(tokenizer.vocab_size, sequence_len), set()
    for task in load_core_tasks(core_dir):
        _, questions = task_questions(task, tokenizer, sequence_len)
        if task.kind == "language_modeling":            # make the model right about some
            with torch.inference_mode():
                for q in questions[::2]:
                    best = model(torch.tensor([q.rows[0][:-1]]))[0].argmax(-1)
                    q.rows[0][-1], q.starts[0] = int(best[-1]), len(q.rows[0]) - 1
        expected = [float(answer_naive(model, q)) for q in questions]
        seen |= {(task.kind, right) for right in expected}
        for max_rows in (1, 5, 64):
            scores = score_questions(model, questions, max_rows)
            assert [credit(q, s) for q, s in zip(questions, scores)] == expected
            for q, rows in zip(questions, scores):
                assert [s.loss for s in rows] == pytest.approx([loss for loss, _ in rows_naive(model, q)], abs=1e-4)
    assert len(seen) == 6                               # each kind had right and wrong answers


ADDITIONS = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "window_pattern": "SL"}


@given(seed=st.integers(0, 10**6), shape=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_mixed_batches(seed, shape):
    "Any mixture of shared beginnings, numbers of rows and lengths, in a model with all additions."
    rng = random.Random(seed)
    model = random_model(50, 64, seed=1, **ADDITIONS)
    questions = []
    for lengths in shape:
        beginning = [0, *(rng.randrange(1, 50) for _ in range(rng.randint(0, 40)))]
        rows = [beginning + [rng.randrange(1, 50) for _ in range(n)] for n in lengths]
        questions.append(Question(rows, [rng.randint(1, len(row) - 1) for row in rows], 0))
    for q, scores in zip(questions, score_rows(model, questions)):
        naive = rows_naive(model, q)
        assert [s.loss for s in scores] == pytest.approx([loss for loss, _ in naive], rel=1e-4, abs=1e-4)
        assert all(s.greedy == exact or 0 < s.greedy < 1 for s, (_, exact) in zip(scores, naive))


def test_every_question_is_in_one_batch():
    rng = random.Random(0)
    questions = [Question([[0] * rng.randint(2, 90)] * rng.randint(1, 4), [1], 0) for _ in range(60)]
    for max_rows, max_tokens in ((1, 10**9), (7, 10**9), (64, 200), (64, 1)):
        batches = batches_by_length(questions, max_rows, max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(60))
        longest = [[max(map(len, questions[i].rows)) for i in batch] for batch in batches]
        assert all(len(b) <= max_rows and (len(b) == 1 or len(b) * b[0] <= max_tokens) for b in longest)
        flat = [n for b in longest for n in b]
        assert flat == sorted(flat, reverse=True)


# ---------------------------------------------------------------- ties

def verdict(losses, gold, rows=None):
    rows = rows or [[0, i + 1] for i in range(len(losses))]
    return credit(Question(rows, [1] * len(rows), gold), [RowScore(loss, 0.0) for loss in losses])


def test_ties_share_the_credit():
    assert verdict([2.0, 1.0, 3.0], 1) == 1 and verdict([2.0, 1.0, 3.0], 0) == 0
    assert [verdict([1.0, 1.0, 2.0], gold) for gold in range(3)] == [0.5, 0.5, 0]
    assert verdict([1.0] * 4, 3) == 0.25
    assert verdict([1.0, 7.0, 2.0], 1, rows=[[0, 5], [0, 5], [0, 6]]) == 0.5      # equal rows: the loss is looked up
    assert verdict([math.nan] * 3, 0) == 0 and verdict([math.nan, 1.0], 0) == 0   # a broken model is not right


@given(losses=st.lists(st.floats(0, 3), min_size=2, max_size=5), noise=st.integers(0, 10**6), data=st.data())
@settings(max_examples=200, deadline=None)
def test_rounding_does_not_decide(losses, noise, data):
    "Shifts of a millionth of a nat change nothing, unless a gap happens to be TIE."
    equal = data.draw(st.lists(st.integers(0, len(losses) - 1), max_size=3))
    losses = losses + [losses[i] for i in equal]                                  # some answers must tie
    gold = data.draw(st.integers(0, len(losses) - 1))
    if any(abs(loss - min(losses) - TIE) < 1e-5 for loss in losses):
        return
    rng = random.Random(noise)
    assert verdict([loss + rng.uniform(-2e-6, 2e-6) for loss in losses], gold) == verdict(losses, gold)


def test_a_newborn_guesses(tokenizer, core_dir):
    newborn = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    for task in load_core_tasks(core_dir):
        for max_rows in (1, 64):
            right = score_task(newborn, tokenizer, task, max_rows=max_rows)
            if task.kind == "language_modeling":        # all tokens tie: right by a chance of 1/V each
                assert right.max() < 1e-2
            else:
                assert right.tolist() == pytest.approx([1 / len(MC[0]["choices"]) if "pick" in task.label else 0.5] * len(right))


def test_twins_and_order(tokenizer):
    "Two options of one text, in any place and batch: always half; the order of the options does not matter."
    model = random_model(tokenizer.vocab_size)
    other = [make_question("multiple_choice", tokenizer.encode_batch([f"{'word ' * i}a", f"{'word ' * i}bb"]), 0, tokenizer.bos, 128)
             for i in range(12)]
    seen = set()
    for choices in itertools.permutations(["no", "no", "yes indeed"]):
        for gold in range(3):
            rows = tokenizer.encode_batch(render_prompts("multiple_choice", {"query": "Well?", "choices": choices, "gold": gold}))
            q = make_question("multiple_choice", rows, gold, tokenizer.bos, 128)
            alone, together = credit(q, score_rows(model, [q])[0]), credit(q, score_rows(model, [*other, q])[-1])
            assert alone == together
            seen.add((choices[gold], alone))
    assert seen in ({("no", 0.5), ("yes indeed", 0.0)}, {("no", 0.0), ("yes indeed", 1.0)})


def test_greedy_ties():
    "Where two tokens have the same largest logit, each is written with probability one half."
    model = random_model(20)
    with torch.no_grad():                               # both point where the stream does after [0, 1]
        model.lm_head.weight[3] = model.lm_head.weight[7] = model.hidden(torch.tensor([[0, 1]]))[0, -1]
    (row,), (miss,) = score_rows(model, [Question([[0, 1, 7]], [2], None), Question([[0, 1, 5]], [2], None)])
    assert row.greedy == 0.5 and miss.greedy == 0


# ---------------------------------------------------------------- scores and their errors

def test_scores(tokenizer, core_dir):
    model = random_model(tokenizer.vocab_size)
    result = evaluate_core(model, tokenizer, core_dir)
    assert evaluate_core(model, tokenizer, core_dir, max_rows=1) == result
    assert result["name"] == f"CORE-style ({core_dir.parent.name})" and result["core"]["n"] == 14 + 9 + 11 + 14
    for task in load_core_tasks(core_dir):
        r = result["tasks"][task.label]
        shares = [score_task(model, tokenizer, task, rank=rank, world_size=2) for rank in range(2)]
        assert torch.equal(sum(shares), score_task(model, tokenizer, task)) and r["scores"] == sum(shares).tolist()
        a, n = r["accuracy"]["value"], len(r["scores"])
        assert a == pytest.approx(sum(r["scores"]) / n) and r["accuracy"]["n"] == n
        assert r["accuracy"]["stderr"] == pytest.approx(math.sqrt(a * (1 - a) / n))
        assert r["centered"] == pytest.approx(centered(a, task.baseline))
    assert result["core"]["value"] == pytest.approx(sum(r["centered"] for r in result["tasks"].values()) / 4)
    assert centered(0.25, 0.25) == 0 and centered(1, 0.25) == 1
    with pytest.raises(UserError, match="no questions"):
        evaluate_core(model, tokenizer, core_dir, max_per_task=0)


def world(*tasks):
    "Results as `evaluate_core` gives them: (file, scores, baseline) each."
    return {f"task {i}": {"scores": list(map(float, scores)), "source": source, "baseline": baseline, "num_fewshot": 0,
                          "accuracy": {"n": len(scores)}, "centered": centered(float(np.mean(scores)), baseline)}
            for i, (source, scores, baseline) in enumerate(tasks)}


def as_result(tasks):
    values = [task["centered"] for task in tasks.values()]
    return {"core": {"value": sum(values) / len(values), "n": sum(t["accuracy"]["n"] for t in tasks.values())}, "tasks": tasks}


def test_bootstrap_against_the_formula():
    rng = np.random.default_rng(1)
    tasks = world(*((f"file {i}", rng.random(n) < a, b) for i, (n, a, b) in enumerate([(400, .6, .25), (90, .3, 0), (150, .8, .5)])))
    formula = math.hypot(*(standard_error(t["scores"]) / (1 - t["baseline"]) for t in tasks.values())) / 3
    drawn = resampled_core(tasks, 6000)
    assert drawn.std() == pytest.approx(formula, rel=0.04)              # 6,000 draws: an error of 0.9 %
    assert drawn.mean() == pytest.approx(as_result(tasks)["core"]["value"], abs=4 * formula / math.sqrt(6000))
    assert np.array_equal(drawn, resampled_core(tasks, 6000)) and not np.array_equal(drawn, resampled_core(tasks, 6000, seed=1))
    assert standard_error([1, 1, 0, 0.5]) == pytest.approx(np.std([1, 1, 0, 0.5]) / 2)


def test_bootstrap_against_all_resamples():
    "Four questions have 4⁴ equally likely resamples; two tasks of one file take the same ones."
    first, second = np.array([1, 0, 0, 1.0]), np.array([1, 0, 0.5, 1.0])
    every = [centered(first[list(i)].mean(), 0.25) / 2 + centered(second[list(i)].mean(), 0.0) / 2
             for i in itertools.product(range(4), repeat=4)]
    drawn = resampled_core(world(("a", first, 0.25), ("a", second, 0.0)), 20000)
    assert drawn.std() == pytest.approx(np.std(every), rel=0.02) and set(drawn.round(9)) <= set(np.round(every, 9))
    apart = resampled_core(world(("a", first, 0.25), ("b", second, 0.0)), 20000)
    alone = [centered(x[list(i)].mean(), b) / 2 for i in itertools.product(range(4), repeat=4) for x, b in ((first, .25),)]
    assert apart.std() == pytest.approx(math.hypot(np.std(alone), standard_error(second) / 2), rel=0.03)
    assert drawn.std() > 1.2 * apart.std()                              # questions in common: more noise


def test_bootstrap_against_new_questions():
    "What the bootstrap promises: how much the score varies when really other questions are asked."
    rng = np.random.default_rng(2)

    def ask_again(n=120):
        hard = rng.random(n)                                            # questions differ; two tasks share them
        return world(("a", rng.random(n) > hard, 0.25), ("a", rng.random(n) > 0.8 * hard, 0.0), ("b", rng.random(60) < .4, 0))
    truth = np.std([as_result(ask_again())["core"]["value"] for _ in range(3000)])
    promised = np.mean([resampled_core(ask_again(), 200, seed).std() for seed in range(60)])
    assert promised == pytest.approx(truth, rel=0.05)


def test_paired_difference():
    rng = np.random.default_rng(3)
    a = [rng.random(n) < 0.5 for n in (200, 150)]
    b = [np.where(rng.random(len(x)) < 0.15, ~x, x) | (rng.random(len(x)) < 0.05) for x in a]   # mostly the same answers
    first, second = (as_result(world(*((f"f{i}", x, 0.25) for i, x in enumerate(xs)))) for xs in (a, b))
    difference = core_difference(first, second, draws=5000)
    per_task = [np.std(y.astype(float) - x) / math.sqrt(len(x)) / 0.75 for x, y in zip(a, b)]
    assert difference["stderr"] == pytest.approx(math.hypot(*per_task) / 2, rel=0.05)
    assert difference["value"] == pytest.approx(second["core"]["value"] - first["core"]["value"])
    unpaired = math.hypot(*(resampled_core(r["tasks"]).std() for r in (first, second)))
    assert difference["stderr"] < 0.8 * unpaired
    assert core_difference(first, first)["stderr"] == 0 and core_difference(first, first)["value"] == 0
    fewer = as_result(world(("f0", a[0][:50], 0.25), ("f1", a[1], 0.25)))
    with pytest.raises(UserError, match="same questions"):
        core_difference(first, fewer)


@pytest.mark.parametrize("p, q, disagree", [(0.5, 0.6, None), (0.5, 0.6, 0.25), (0.2, 0.3, 0.2), (0.7, 0.6, 0.4)])
def test_questions_needed_are_enough_and_not_too_many(p, q, disagree):
    "Simulated experiments of that size see the difference in four cases of five, and half as large ones do not."
    rng = np.random.default_rng(4)

    def power(n, experiments=3000):
        if disagree is None:
            d = (rng.random((experiments, n)) < q).astype(float) - (rng.random((experiments, n)) < p)
        else:
            up = (disagree + q - p) / 2
            d = rng.choice([1.0, -1.0, 0.0], p=[up, disagree - up, 1 - disagree], size=(experiments, n))
        error = d.std(1) / math.sqrt(n)
        return (np.abs(d.mean(1)) > 1.96 * error).mean()
    n = questions_needed(p, q, disagree)
    assert power(n) == pytest.approx(0.8, abs=0.05) and power(n // 2) < 0.7


def test_questions_needed_refuses():
    with pytest.raises(UserError, match="equal"):
        questions_needed(0.5, 0.5)
    with pytest.raises(UserError, match="disagree"):
        questions_needed(0.5, 0.6, 0.05)
    assert questions_needed(0, 0.1, 0.1) < questions_needed(0.5, 0.6, 0.3) < questions_needed(0.5, 0.6)
    assert questions_needed(0.0, 1.0, 1.0) == 1


# ---------------------------------------------------------------- processes, folders, real tasks

RANK = """
import json, sys
import torch
from nanochat_nb.common import compute_cleanup, compute_init
from nanochat_nb.evaluation import evaluate_core
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer
torch.set_num_threads(1)
folder, core_dir, max_per_task = sys.argv[1:]
compute = compute_init("cpu")
model = GPT(GPTConfig(**json.load(open(folder + "/config.json"))))
model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True), strict=False)
result = evaluate_core(model, Tokenizer.load(folder), core_dir, int(max_per_task), compute.rank, compute.world_size)
open(f"{folder}/result{compute.rank}.json", "w").write(json.dumps(result))
compute_cleanup()
"""


def on_two_ranks(model, tokenizer, folder, core_dir, max_per_task=-1):
    "What each of two torchrun processes gets."
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "rank.py").write_text(RANK)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(folder / "rank.py"), str(folder), str(core_dir), str(max_per_task)], check=True, timeout=300)
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_agree_with_one(tokenizer, core_dir, tmp_path):
    model = random_model(tokenizer.vocab_size)
    expected = evaluate_core(model, tokenizer, core_dir)
    assert on_two_ranks(model, tokenizer, tmp_path, core_dir) == [expected, expected]


def test_broken_folders(core_dir, tmp_path):
    with pytest.raises(UserError, match="no core.yaml"):
        load_core_tasks(tmp_path)

    def broken(change):
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


@pytest.fixture(scope="module")
def real_tokenizer():
    tasks = load_core_tasks(TEST_DATA / "core")
    return Tokenizer.train([json.dumps(item) for task in tasks for item in task.items[:15]], 1200)


@real_core
def test_the_22_tasks_for_any_batch_and_number_of_ranks(real_tokenizer, tmp_path):
    model = random_model(real_tokenizer.vocab_size, 256)
    result = evaluate_core(model, real_tokenizer, TEST_DATA / "core", max_per_task=4)
    assert set(result["tasks"]) == CORE_LABELS and result["name"] == "CORE" and result["core"]["n"] == 22 * 4
    assert evaluate_core(model, real_tokenizer, TEST_DATA / "core", max_per_task=4, max_rows=1) == result
    assert on_two_ranks(model, real_tokenizer, tmp_path, TEST_DATA / "core", 4) == [result, result]
    tasks = result["tasks"]
    assert tasks["hellaswag"]["source"] == tasks["hellaswag_zeroshot"]["source"]
    assert len({task["source"] for task in tasks.values()}) == 21


@real_core
def test_real_prompts(real_tokenizer):
    tasks = {task.label: task for task in load_core_tasks(TEST_DATA / "core")}

    def first(label):
        _, (question,) = task_questions(tasks[label], real_tokenizer, 10**6, max_per_task=1)
        return question, [real_tokenizer.decode(row[start:]) for row, start in zip(question.rows, question.starts)]

    arc = tasks["arc_easy"]
    text = real_tokenizer.decode((question := first("arc_easy")[0]).rows[question.gold][1:])
    assert text.count("\nAnswer: ") == 11 and text.count("\n\n") >= 10
    assert text.endswith(f"{arc.items[0]['query']}\nAnswer: {arc.items[0]['choices'][arc.items[0]['gold']]}")
    assert first("winograd")[1] == [" " + tasks["winograd"].items[0]["continuation"]] * 2
    assert first("lambada_openai")[1] == [" " + tasks["lambada_openai"].items[0]["continuation"]]


def test_cut_left_keeps_the_end():
    q = Question([[0, 1, 2, 3, 4, 5], [0, 1, 2, 9]], [4, 3], 1)
    assert cut_left(q, 0, 5) == q and cut_left(q, 0, 4) == Question([[0, 2, 3, 4, 5], [0, 2, 9]], [3, 2], 1)
    assert cut_left(q, 0, 2) == Question([[0, 4, 5], [2, 9]], [1, 1], 1)
