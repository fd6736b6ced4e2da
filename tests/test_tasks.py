"""Tasks and mixtures on hand-written files; real benchmark files when NANOCHAT_TEST_DATA is set."""
import json
import os
import random
import sys
import types
from decimal import Decimal
from pathlib import Path

import pytest

from nanochat_nb.chat import check_messages, content_text, render_conversation
from nanochat_nb.common import UserError
from nanochat_nb.execution import sandbox_level
from nanochat_nb import tasks
from nanochat_nb.tasks import (
    TASKS, Code, Math, MultipleChoice, SimpleSpelling, SpellingBee, TaskMixture, available_tasks,
    final_number, load_conversations, load_task, mid_mixture, prepare_tasks, read_jsonl, sft_mixture,
    solution_parts)
from nanochat_nb.tokenizer import Tokenizer

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or "/nonexistent")
real_data = pytest.mark.skipif(not (DATA / "tasks").is_dir(), reason="needs NANOCHAT_TEST_DATA")
sandboxed = pytest.mark.skipif(sandbox_level() == "none", reason="code cannot be confined here")


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "chat/a.jsonl", [talk(f"q{i}", f"a{i}") for i in range(200)])
    write(tmp_path / "tasks/pocket_facts_train.jsonl",
          [{"question": f"q{i}", "choices": ["x", "y", "z"], "answer": i % 3} for i in range(100)])
    write(tmp_path / "tasks/pocket_sums_test.jsonl", [{"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}])
    (tmp_path / "tasks/words_train.txt").write_text("apple\nbanana\nCherry\nit\nplum\n")
    (tmp_path / "tasks/words_test.txt").write_text("melon\n")
    return tmp_path


@pytest.mark.parametrize("text, number", [
    ("#### 18", "18"), ("#### 18.", "18"), ("#### 18.0", "18"), ("####$1,234", "1234"), ("#### -3", "-3"),
    ("#### -$3.50", "-3.5"), ("#### $-3", "-3"), ("#### −3", "-3"), ("a\n#### 5 dollars", "5"),
    ("#### 1\n#### 2", "2"), ("#### .5", "0.5"), ("#### 70%", "70")])
def test_final_number(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "18", "####", "#### none", "#### --3", "#### ,", "#### nan"])
def test_no_final_number(text):
    assert final_number(text) is None


def test_calculator_marks():
    assert solution_parts("a <<1+1=2>>2 <<3*4=12>>12") == [
        {"type": "text", "text": "a "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2 "}, {"type": "python", "text": "3*4"}, {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12"}]
    assert solution_parts("no marks") == [{"type": "text", "text": "no marks"}]


def test_choice_layouts_and_bad_rows():
    plain = {"question": "q", "choices": ["x", "y"], "answer": 1}
    task = MultipleChoice("T", [plain, plain | {"answer": "B"}, {
        "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}])
    assert task[0] == task[1] == task[2] and task[0]["letters"] == ["A", "B"]
    assert task.baseline == 0.5 and not task.evaluate(task[0], "") and task.evaluate(task[0], "B.")
    for bad in ({"answer": 2}, {"answer": -1}, {"answer": True}, {"answer": None}, {"answer": "Z"},
                {"choices": ["x"]}, {"choices": "xy"}, {"choices": [1, 2]}, {"question": None}):
        with pytest.raises(UserError, match="not a row of T"):
            MultipleChoice("T", [plain | bad])
    with pytest.raises(UserError):
        MultipleChoice("T", ["text"])


def test_bad_rows_of_a_file_are_named_by_line(folder):
    path = folder / "tasks/gsm8k_test.jsonl"
    write(path, [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "1"}])
    with pytest.raises(UserError, match="gsm8k_test.jsonl, line 2"):
        load_task("GSM8K", "test", folder)
    path.write_bytes(b'{"question": "q", "answer": "#### 1"}\n\xff\xfe\n')
    with pytest.raises(UserError, match="line 2"):
        list(read_jsonl(path))


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1"):
        list(read_jsonl(path))
    with pytest.raises(UserError, match="cannot read"):
        list(read_jsonl(tmp_path / "missing.jsonl"))


def test_unknown_and_missing_tasks(folder):
    assert available_tasks(folder) == ["Pocket-Sums", "Pocket-Spelling"]
    for name, split in (("Nope", "test"), ("GSM8K", "test"), ("Pocket-Sums", "train"), ("HumanEval", "train"),
                        ("Pocket-Sums", "val")):
        with pytest.raises(UserError):
            load_task(name, split, folder)


def test_spelling_is_deterministic_and_right(folder):
    bee = load_task("Pocket-Spelling", "train", folder)
    assert sorted(bee.rows) == ["apple", "banana", "plum"]  # lower case, three letters and more
    for conversation in bee:
        assert conversation["messages"] == check_messages(conversation["messages"])
        assert bee.evaluate(conversation, content_text(conversation["messages"][1]["content"]))
        assert not bee.evaluate(conversation, "#### 99")
    simple = SimpleSpelling("S", ["cat"])
    assert simple.evaluate(simple[0], " cat:c,a,t\n") and not simple.evaluate(simple[0], "cat:c,a")


def test_math_needs_a_number_on_both_sides():
    task = Math("M", [{"question": "q", "answer": "#### 2"}])
    assert task.evaluate(task[0], "it is\n#### 2.00") and not task.evaluate(task[0], "2")


@sandboxed
def test_code_replies_in_every_shape():
    prompt = 'import math\n\ndef helper(x):\n    return x\n\ndef root(x):\n    """Root of x."""\n'
    task = Code("C", [{"prompt": prompt, "entry_point": "root", "canonical_solution": "    return math.sqrt(x)\n",
                       "test": "def check(c):\n    assert c(9) == 3\n"}])
    right = ["    return math.sqrt(x)\n", "def root(x):\n    return math.sqrt(helper(x))",
             "```python\r\ndef root(x):\r\n    return x ** .5\r\n```\r\nDone.", "```\ndef root(x):\n  return x**.5",
             task[0]["messages"][1]["content"]]
    wrong = ["", "I cannot.", "    return x\n", "    import sys; sys.exit(0)\n", "def root(x: ", "```\n```"]
    assert [task.evaluate(task[0], reply) for reply in right + wrong] == [True] * 5 + [False] * 6


def test_conversations_are_checked_and_divided_by_content(folder):
    train, val = load_conversations(folder, "train"), load_conversations(folder, "val")
    assert len(val) == 4 and len(train) == 196
    assert not {str(c) for c in train} & {str(c) for c in val}
    rows = [json.loads(line) for line in (folder / "chat/a.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    write(folder / "chat/a.jsonl", rows[:100])
    write(folder / "chat/b.jsonl", [row["messages"] for row in rows[100:]])  # bare lists are read too
    assert sorted(map(str, load_conversations(folder, "val"))) == sorted(map(str, val))
    for bad in ([talk("q", None)], [{"messages": []}], [3], [{"text": "x"}],
                [{"messages": [{"role": "assistant", "content": "hi"}]}],
                [talk("q", "a") | {"messages": [{"role": "user", "content": "q"}]}]):
        write(folder / "chat/c.jsonl", [talk("fine", "yes"), *bad])
        with pytest.raises(UserError, match="c.jsonl, line 2"):
            load_conversations(folder)


def test_a_folder_without_conversations(tmp_path):
    (tmp_path / "chat").mkdir()
    with pytest.raises(UserError, match="no conversations"):
        load_conversations(tmp_path)
    write(tmp_path / "chat/a.jsonl", [talk("q", "a")] * 3)
    with pytest.raises(UserError, match="only one conversation"):
        load_conversations(tmp_path)


def test_mixture_counts_and_order():
    a, b = [talk("a", str(i)) for i in range(10)], [talk("b", str(i)) for i in range(4)]
    mixture = TaskMixture([(a, 0.5), (b, 2.5)])
    seen = [row["messages"][1]["content"] for row in mixture if row["messages"][0]["content"] == "b"]
    assert len(mixture) == 15 and len(seen) == 10 and set(seen) == set("0123")
    assert max(seen.count(c) for c in "0123") == 3
    assert list(TaskMixture([(a, 0.5), (b, 2.5)])) == list(mixture)
    assert list(TaskMixture([(a, 0.5), (b, 2.5)], seed=1)) != list(mixture)
    assert mixture[-1] == mixture[14] and len(TaskMixture([])) == 0
    with pytest.raises(IndexError):
        mixture[15]


def test_mixtures_of_a_folder(folder):
    for make in (mid_mixture, sft_mixture):
        train, val = ({str(row["messages"]) for row in make(folder, split)} for split in ("train", "val"))
        assert len(train) > 290 and val - train and len(val & train) <= 2  # three words, one kept for both
        for row in make(folder):
            check_messages(row["messages"])
        assert list(make(folder)) == list(make(folder))


def test_hub_files_become_our_shapes(tmp_path, monkeypatch):
    "The hub is played by a stand-in: what is written must be readable by our own readers."
    rows = {"messages": talk("hi", "ho")["messages"], "question": "q", "answer": "#### 1", "subject": "s",
            "choices": ["x", "y"], "answerKey": "A", "id": "1", "task_id": "t", "prompt": "def f():\n",
            "entry_point": "f", "canonical_solution": "    pass\n", "test": "def check(c): pass\n"}

    class Rows(list):
        def select_columns(self, columns):
            return Rows({c: row[c] for c in columns} for row in self)

    def load_dataset(path, name, split, revision):
        assert revision == "c0ffee00"
        row = dict(rows)
        if "mmlu" in path:
            row["answer"] = 0
        if "arc" in path:
            row["choices"] = {"text": ["x", "y"], "label": ["A", "B"]}
        bad = row | {"messages": row["messages"][:1]}
        return Rows([row, row | {"messages": talk("he", "ha")["messages"]}] + [bad] * ("smol" in path))

    class HfApi:
        def dataset_info(self, repo_id, revision):
            return types.SimpleNamespace(sha="c0ffee00")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))

    def fetch(url, path, attempts=4):
        import zipfile
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as bundle:
                bundle.writestr("eval_bundle/core.yaml", "icl_tasks: []\n")
        else:
            path.write_text("apple\nbanana\n" + "".join(f"w{a}{b}\n" for a in "abcdefgh" for b in "abcdefgh"))
        return path

    monkeypatch.setattr(tasks, "_fetch", fetch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    made = prepare_tasks("climbmix")
    assert made == tmp_path / "data/climbmix" and (made / "core/core.yaml").is_file()
    names = available_tasks("climbmix")
    assert names == [name for name in TASKS if not name.startswith("Pocket")]
    for name in names:
        assert len(load_task(name, "test", "climbmix")) > 0
    assert len(load_conversations(made, "train")) == 1
    manifest = json.loads((made / "tasks/manifest.json").read_text())
    assert manifest["chat/smol_smoltalk.jsonl"]["left_out"] == 1
    assert not [p for p in made.rglob(".*")]
    prepare_tasks("climbmix")  # nothing to do


@real_data
def test_real_files():
    names = available_tasks(DATA)
    assert names == ["MMLU", "ARC-Easy", "ARC-Challenge", "GSM8K", "HumanEval", "SpellingBee"]
    tokenizer = Tokenizer.train(["some text " * 10], 270)
    for name in names:
        task = load_task(name, "test", DATA)
        assert len(task) > 100
        for i in range(0, len(task), max(1, len(task) // 20)):
            conversation = task[i]
            render_conversation(tokenizer, conversation)
            if task.kind == "choice" or isinstance(task, (Math, SpellingBee)):
                assert task.evaluate(conversation, content_text(conversation["messages"][-1]["content"]))
    sft, mid = sft_mixture(DATA), mid_mixture(DATA)
    assert 20_000 < len(sft) < len(mid) and len(mid_mixture(DATA, "val")) > 300
    assert 0.2 < load_task("ARC-Challenge", "test", DATA).baseline < 0.3


@real_data
@sandboxed
def test_all_canonical_solutions_of_humaneval_pass():
    task = load_task("HumanEval", "test", DATA)
    for conversation in list(task)[::4]:
        assert task.evaluate(conversation, conversation["messages"][1]["content"]), conversation["entry_point"]


# ---------------------------------------------------------------- chat evaluation (07d)

@pytest.fixture
def trained(tmp_path, monkeypatch):
    "A base folder with a tokenizer, an (untrained) SFT checkpoint and a data folder of two tasks."
    import torch
    from nanochat_nb.checkpoint import save_checkpoint
    from nanochat_nb.gpt import GPT, GPTConfig
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    data = tmp_path / "data/pocket/tasks"
    rows = [{"question": f"Which is word {i}?", "choices": ["stone", "plum", f"w{i}"], "answer": i % 3}
            for i in range(23)]
    write(data / "pocket_facts_test.jsonl", rows)
    write(data / "pocket_sums_test.jsonl",
          [{"question": f"What is {i} plus {i * i}?", "answer": f"<<{i}+{i * i}={i + i * i}>>\n#### {i + i * i}"}
           for i in range(9)])
    tokenizer = Tokenizer.train([json.dumps(row) for row in rows], 300)
    tokenizer.save()
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_kv_head=2, n_embd=32)).init_weights(seed=0)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(0, 1.0)
    save_checkpoint("sft", "tiny", 3, model, meta={"tokenizer_fingerprint": tokenizer.fingerprint()})
    return tmp_path


def run_chat_eval(*flags, ranks=0):
    import subprocess
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run([sys.executable, *launch, "-m", "nanochat_nb.chat_eval", "--device_type=cpu", *flags],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32"})


def test_chat_eval_is_the_same_on_two_ranks(trained):
    from nanochat_nb.chat_eval import chat_eval
    flags = {"max_new_tokens": 12, "batch_size": 4, "temperature": 1.0}
    os.environ["NANOCHAT_DTYPE"] = "float32"
    try:
        alone = chat_eval("sft", device_type="cpu", **flags)
    finally:
        del os.environ["NANOCHAT_DTYPE"]
    path = trained / "report/08-chat-evaluation-sft.json"
    first = json.loads(path.read_text())
    assert first["metrics"] == {"SFT": json.loads(json.dumps(alone))}
    assert set(alone) == {"Pocket-Facts", "Pocket-Sums", "ChatCORE"} and alone["Pocket-Facts"]["n"] == 23
    assert "**Pocket-Sums**" in first["text"]
    path.unlink()
    done = run_chat_eval(*(f"--{name}={value}" for name, value in flags.items()), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(path.read_text())["metrics"] == first["metrics"]
    assert done.stdout.count("ChatCORE") == 1  # one table, not two


def test_chat_eval_refuses_in_one_line(trained):
    done = run_chat_eval("--tasks", "Pocket-Facts|Nope")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "no task 'Nope'" in done.stderr and "Pocket-Sums" in done.stderr
    from nanochat_nb.chat_eval import chat_eval
    for wrong in ({"source": "base"}, {"tasks": "GSM8K"}, {"batch_size": 0}, {"max_problems": 0},
                  {"temperature": -1.0}, {"data_dir": "nowhere"}, {"source": "rl"}):
        with pytest.raises(UserError):
            chat_eval(**{"device_type": "cpu", **wrong})


def test_a_part_of_the_tasks_has_no_chatcore(trained):
    from nanochat_nb.chat_eval import chat_eval
    metrics = chat_eval("sft", tasks="Pocket-Facts", max_problems=5, device_type="cpu")
    assert set(metrics) == {"Pocket-Facts"} and metrics["Pocket-Facts"]["n"] == 5
    again = chat_eval("sft", tasks="Pocket-Facts", max_problems=5, device_type="cpu", batch_size=2)
    assert again == metrics
