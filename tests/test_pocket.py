"""The built-in world: right grammar, right answers, and tests that training does not give away."""
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_module
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb import grammar, islands, pocket, practice, skills, stories
from nanochat_nb.common import UserError

SEEDS = st.integers(0, 2**32)
UNSURE = ("uni", "use", "uku", "eu", "one", "hour", "honest", "honour", "heir")  # said otherwise


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "world"
    pocket.write_pocket(folder, num_chars=400_000)
    return folder


@pytest.fixture(scope="module")
def secrets(world) -> list[pocket.Secret]:
    return list(pocket.test_secrets(world))


# ---------------------------------------------------------------- grammar

@given(st.lists(st.from_regex(r"[a-z]{2,8}", fullmatch=True).filter("and".__ne__), min_size=1))
def test_listing_can_be_read_back(items):
    assert grammar.listing(items).replace(" and ", ", ").split(", ") == items


@given(st.integers(0, 999), st.integers(0, 999))
def test_numbers_in_words_are_told_apart(a, b):
    assert (grammar.in_words(a) == grammar.in_words(b)) == (a == b)


def test_articles_and_plurals_of_all_words():
    nouns = {*stories.THINGS, *" ".join(skills.KINDS.values()).split(), *skills.KINDS,
             *(job for job, _ in grammar.table_rows(skills.JOBS))}
    assert not [noun for noun in nouns if noun.startswith(UNSURE)]
    named = {noun: grammar.plural(noun) for noun in (*stories.THINGS, *skills.NOUNS)}
    assert [n for n, p in named.items() if n == p] == []
    by_hand = """leaf leaves/knife knives/shelf shelves/calf calves/wolf wolves/roof roofs/cliff cliffs
        dwarf dwarfs/hero heroes/potato potatoes/piano pianos/kangaroo kangaroos/foot feet/goose geese
        mouse mice/tooth teeth/child children/fish fish/sheep sheep/story stories/valley valleys
        monkey monkeys/butterfly butterflies/match matches/path paths/class classes/box boxes"""
    for pair in by_hand.replace("\n", "/").split("/"):
        assert grammar.plural(pair.split()[0]) == pair.split()[1]
    assert not {grammar.plural(n) for n in skills.MASS_NOUNS} & set(sum(skills.spelling_words(), ()))
    assert not [p for p in named.values() if re.search(r"[^aeiou]ys$|(s|x|z|ch|sh)s$|(.)ss$", p)]


def test_every_sentence_is_grammatical(world):
    "Of all texts and conversations: articles, plurals, capitals, spaces."
    texts = [text for text in pocket.training_documents(world) if "def " not in text]
    rules = {r"\b[Aa] [aeiou]\w+|\b[Aa]n [^aeiou\W]\w+": "The letter a occurs once, a in all",
             r"(?<!\w)1 (?!is\b)\w+s\b": "", r"\w  \w|\w [.,?!]|[.,]{2}": ""}
    for rule, allowed in rules.items():
        found = {m[0] for text in texts for m in re.finditer(rule, text) if m[0] not in allowed}
        assert not found, found
    told = [text for text in texts if " | " not in text and ":" not in text]
    assert len(told) > 300 and not [s for s in told if re.search(r"[.?!] [a-z]|^[a-z]", s)]


# ---------------------------------------------------------------- answers are true

@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(stories.PLOTS))
def test_questions_have_one_right_answer_and_three_others(seed, plot):
    for q in plot(random.Random(seed)).questions:
        assert q.answer not in q.wrong and len(set(q.wrong)) >= 3
        assert q.text.endswith("?") and q.sentence.endswith(".")


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_who_has_the_gift_now_and_who_is_tallest(seed):
    "Answers found a second time, in the text alone."
    gift = stories.gift(random.Random(seed))
    last = re.search(r"Now (.+) has the|Now the \w+ belongs to (.+)\.", gift.text)
    (now,) = [q.answer for q in gift.questions if q.text.endswith("now?")]
    handed = re.search(r"handed the \w+ to (.+?)\.", gift.text)
    assert now == (last[1] or last[2]) and (not handed or now == handed[1])

    moves = stories.moves(random.Random(seed))
    taker = re.search(r"([Tt]he \w+|\w+) picked up", moves.text)[1].replace("The", "the")
    assert moves.questions[-1].answer == taker and "first" in moves.questions[-1].text

    compared = stories.compare(random.Random(seed))
    pairs = re.findall(r"([Tt]he \w+|\w+) is \w+ than (the \w+|\w+)\.", compared.text)
    above = {a[0].lower() + a[1:] if a.startswith("The ") else a: b for a, b in pairs}
    (top,) = set(above) - set(above.values())
    assert [q.answer for q in compared.questions] == [top, above[above[top]], above[top]]


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.booleans())
def test_sums_are_right_and_of_one_part(seed, test):
    question, solution = skills.word_problem(random.Random(seed), test)
    steps = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", solution)
    for x, op, y, result in steps:
        assert eval(f"{x}{op}{y}") == int(result) > 1
        assert skills.sum_held_out(int(x), op, int(y)) == test
        assert skills.sum_held_out(int(y), op, int(x)) == test
    assert solution.endswith(f"#### {steps[-1][3]}")


def test_no_held_out_function_does_what_a_training_function_does():
    "Not only other names: for some argument each held-out function returns something new."
    numbers = [[k] for k in range(100)] + [[k, 90 - k, 1] for k in range(0, 91, 3)]
    texts = [*skills.THINGS, "the quick brown fox", *"abcdefghijklmnopqrstuvwxyz"]
    inputs = {"x": [(k,) for k in range(-3, 160)], "numbers": [(n,) for n in numbers],
              "text": [(t + suffix,) for t in texts for suffix in ("", "a", "zz")],
              "x, y": [(k, 7 * k % 30) for k in range(40)]}

    def behaviour(f):
        space = {}
        exec(f.prompt + f.body, space)
        parameters = re.search(r"\((.+)\):", f.prompt)[1]
        return parameters, repr([space[f.name](*args) for args in inputs[parameters]])

    train, test = skills.functions()
    trained = {behaviour(f) for f in train}
    assert not [f.name for f in test if behaviour(f) in trained]


# ---------------------------------------------------------------- nothing of the tests in training

def test_a_new_world_is_clean(world, secrets):
    manifest = json.loads((world / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["hygiene"]["leaks"] == {}
    assert manifest["hygiene"]["test_items"] == {
        kind: sum(s.kind == kind for s in secrets) for kind in pocket.SECRETS}
    items = {name: n for name, n in manifest["counts"].items()
             if name.endswith("_test") or name.startswith("core/")}
    assert sum(items.values()) == len(secrets)  # every test item of every file is searched for


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_are_clean(tmp_path, seed):
    pocket.write_files(tmp_path / "w", 1_000_000, seed)
    counts, leaks = pocket.find_leaks(tmp_path / "w")
    assert len(counts) == len(pocket.SECRETS) and leaks == []


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_no_generator_gives_an_item_away(seed, tree):
    rng = random.Random(seed)
    made = [make(rng) for make, _ in pocket.DOCUMENTS.values() for _ in range(8)]
    made += [" | ".join(pocket.text_in(make(rng))) for make, _ in practice.CONVERSATIONS.values()
             for _ in range(8)]
    phrases, forms = tree
    for text in made:
        again = pocket.CHOICES.sub("", text)
        hits = pocket.phrases_in(pocket.normal(f"{text} | {again}"), phrases)
        assert not [secret for form, secret in forms if form <= hits], text


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_who_deals_with_whom_is_held_out_in_either_order(seed):
    rng = random.Random(seed)
    known = {p.name for p in grammar.PEOPLE}
    for _ in range(20):
        for test in (False, True):
            names = [w for w in re.findall(r"\w+", skills.consequence(rng, test)[0]) if w in known]
            if len(set(names)) == 2:
                pair = list(dict.fromkeys(names))
                assert grammar.pair_held_out(*pair[::-1], 10) == test
    someone = r"((?:the )?\w+)"
    for plot, rule in ((stories.gift, f"{someone} gave the \\w+ to {someone} because"),
                       (stories.gift, f"{someone} handed the \\w+ to {someone}[.]"),
                       (stories.search, f"{someone} could not find .* asked {someone} for help"),
                       (stories.helper, f"{someone} had a problem.* asked {someone}, but"),
                       (stories.helper, f"{someone} had a problem.* asked {someone}[.]"),
                       (stories.compare, f"{someone} is \\w+ than {someone}[.]")):
        told = [plot(rng).text.replace("The", "the") for _ in range(40)]
        dealt = [pair for text in told for pair in re.findall(rule, text)]
        assert dealt and not [pair for pair in dealt if grammar.pair_held_out(*pair, 10)]


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_parts_and_answers_are_on_one_side(seed):
    "A test story shares no part, and no question with its answer, with a training story."
    rng = random.Random(seed)
    train, test = ([stories.story(rng, part) for _ in range(25)] for part in (False, True))
    for name, of in (("parts", lambda s: s.parts),
                     ("answers", lambda s: [(q.text, q.answer) for q in s.questions])):
        both = {x for s in train for x in of(s)} & {x for s in test for x in of(s)}
        assert not both, name


def test_identical_stories_are_on_one_side(monkeypatch):
    "In a world of one ball and two people, where stories come again and again."
    monkeypatch.setattr(stories, "people", lambda rng, n: rng.sample(grammar.PEOPLE[:2], n))
    monkeypatch.setattr(stories, "THINGS", ["ball"])
    monkeypatch.setattr(stories, "OPENINGS", ("",))
    sides = {}
    for seed in range(20_000):
        made = stories.moves(random.Random(seed))
        sides.setdefault(made.text, set()).add(stories.belongs_to_tests(made))
    assert len(sides) < 19_900 and {len(side) for side in sides.values()} == {1}


def test_wrong_answers_are_those_of_the_story():
    rng = random.Random(0)
    for plot, n in ((stories.likes, 2), (stories.compare, 2), (stories.chores, 3)):
        made = plot(rng)
        for q in (q for q in made.questions if "hat" not in q.text):
            assert sum(w.removeprefix("she ").removeprefix("he ").lower() in made.text.lower()
                       for w in q.wrong) >= n


def test_no_story_for_the_tests(monkeypatch):
    monkeypatch.setattr(stories, "held_out", lambda key, one_in: False)
    with pytest.raises(ValueError, match="no story with test=True"):
        stories.story(random.Random(0), test=True)


@pytest.fixture(scope="module")
def tree(secrets):
    numbers = {}
    forms = [(frozenset(numbers.setdefault(pocket.normal(p), len(numbers)) for p in form), secret)
             for secret in secrets for form in secret.forms]
    return pocket.phrase_tree(numbers), forms


def plant(world, folder, text, where):
    "A copy of the world with a text at one of the places that training reads."
    shutil.copytree(world, folder)
    if where == "text":
        path = folder / "text/shard_00001.parquet"
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table, pa.table({"text": [text]})]), path)
    elif where == "chat":
        with open(folder / "chat/quiz.jsonl", "a", encoding="utf-8") as file:
            parts = [{"type": "text", "text": text}]
            file.write(json.dumps(practice.talk("Go on.", parts)) + "\n")
    else:
        with open(folder / "tasks/pocket_facts_train.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"question": "?", "choices": [text], "answer": 0}) + "\n")
    return folder


@pytest.mark.parametrize("kind, where", list(zip(pocket.SECRETS, itertools.cycle(
    ["text", "chat", "tasks"]))))
def test_planted_leak_is_found(world, secrets, tmp_path, kind, where):
    "Each kind of item, in each of its forms, shouted, in another order, in another frame."
    items = [s for s in secrets if s.kind == kind]
    secret = random.Random(0).choice(items)
    said = lambda form: f"SOMEBODY SAID: {'. And '.join(reversed(form)).upper()}!"
    texts = [said(form) for form in secret.forms]
    folder = plant(world, tmp_path / "w", "\n\n".join(texts[:1]), where)
    found = {(leak.kind, leak.item) for leak in pocket.find_leaks(folder)[1]}
    assert (kind, secret.item) in found
    for text in texts:  # the other forms, without reading the world again
        (form,) = (f for f in secret.forms if text == said(f))
        numbers = {pocket.normal(p): k for k, p in enumerate(form)}
        hits = pocket.phrases_in(pocket.normal(text), pocket.phrase_tree(numbers))
        assert len(hits) == len(form)


def test_test_word_among_the_words_to_practise(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    word = (world / "tasks/words_test.txt").read_text(encoding="utf-8").split()[0]
    with open(tmp_path / "w/tasks/words_train.txt", "a", encoding="utf-8") as file:
        file.write(word + "\n")
    assert {leak.item for leak in pocket.find_leaks(tmp_path / "w")[1]} == {word}


@pytest.mark.parametrize("form, text", [
    ("one plus twenty is", "Twenty-one plus twenty is forty-one."),
    ("6 times 8", "def add_6_times_8(x):"), ("4 + 3 =", "return x * 4 + 3"),
    ("rows:r,o,w,s", "arrows:a,r,r,o,w,s"), ("def add_1(", "def add_12("),
    ("What is the capital of Arvo?", "The capital of Arvo is Tolla.")])
def test_no_false_alarm(form, text):
    tree = pocket.phrase_tree({pocket.normal(form): 0})
    assert pocket.phrases_in(pocket.normal(text), tree) == set()
    assert pocket.phrases_in(pocket.normal(f"Oh: {form.upper()}"), tree) == {0}


def beginnings(start: str) -> dict:
    return {"context_options": [f"{start} Al", f"{start} Bo"], "continuation": "?", "gold": 1}


def reading(text: str, answer: str, sentence: str) -> dict:
    return {"question": text, "choices": ["?", answer], "answer": 1, "sentence": sentence}


def answered(text: str, question: str, answer: str) -> dict:
    return {"context": f"{text}\nQuestion: {question}\nAnswer:", "continuation": answer,
            "sentence": f"{answer}."}


REWORDED = [  # a test item as its file has it, and how a text might give it away
    ("tasks/pocket_facts", {"question": "What is its capital?"}, "WHAT IS its capital"),
    ("tasks/pocket_reading", reading("Once, Al ate. So Bo left.\nWho ate?", "Al", "Al ate."),
     "He said: So Bo left! Then it rained. \"Al ate.\""),
    ("tasks/pocket_reading", reading("Al ate. Bo left.\nWho ate?", "Al", "It was Al who ate."),
     "Al and Cy were hungry.\n\n\"Who ate?\" asked Di.\n\"It was Al who ate,\" said Ed."),
    ("tasks/pocket_reading", reading("Al ate. Bo left.\nWho ate?", "Al", "It was Al who ate."),
     "Al and Cy were hungry.\nQuestion: Who ate?\nAnswer: Al"),
    ("tasks/pocket_sums", {"question": "?", "answer": "In all 12 + 7 = <<12+7=19>>19 eggs."},
     "What is 7 plus 12? It is 19."),
    ("tasks/pocket_sums", {"question": "?", "answer": "<<12+7=19>>19\n<<19-5=14>>14"},
     "So there are 19 - 5 = 14 eggs."),
    ("tasks/pocket_sums", {"question": "?", "answer": "<<3*4=12>>12"}, "Four times three is 12."),
    ("tasks/pocket_code",
     {"entry_point": "add_9", "prompt": 'def add_9(x):\n    """Add 9 to x."""\n'},
     "Write a function that will add 9 to x."),
    ("tasks/words", "boats", "Please spell boats."),
    ("tasks/words", "boats", "A word a line: boats: b, o, a, t, s"),
    ("core/pocket_facts", {"query": "Question: Who rules Arvo?"}, "\"who rules arvo\" asked Al"),
    ("core/pocket_causes", {"query": "It rained, so Al", "choices": ["slept.", "ran."], "gold": 1},
     "Al ran because it rained."),
    ("core/pocket_owners", beginnings("Al gave the hat to Bo. Now"), "Bo got the hat from Al."),
    ("core/pocket_owners", beginnings("Al got the hat from Bo. Now"), "Bo handed the hat to Al."),
    ("core/pocket_reasons", beginnings("Al is older than Bo, so"),
     "Al is older than Bo, so Bo was born later."),
    ("core/pocket_reasons", beginnings("Al was faster than Bo, so"), "Al is faster than Bo."),
    ("core/pocket_reasons", beginnings("Al asked Bo for help because"),
     "Al could not find her hat. She was sad and asked Bo for help."),
    ("core/pocket_reasons", beginnings("Al asked Bo for help because"),
     "Al had a problem: the door was locked. He asked Bo, but Bo had no time."),
    ("core/pocket_reasons", beginnings("Al asked Bo for help because"),
     "Al had a problem: it was late. He asked Cy, but Cy had no time. Then he asked Bo. Bo came."),
    ("core/pocket_reasons", beginnings("Al taught Bo to swim because"), "Al taught Bo to swim."),
    ("core/pocket_reasons", beginnings("The hat did not fit into the cup because the"),
     "So the hat did not fit into the cup."),
    ("core/pocket_statements", {"context": "People on Arvo make", "continuation": "pots"},
     "They say: people on Arvo make pots, and good ones."),
    ("core/pocket_stories", answered("Al ran because it rained. Bo slept.", "Who ran?", "Al"),
     "Bo slept. It rained, so Al ran."),
    ("core/pocket_stories", answered("Al ran because it rained. Bo slept.", "Who ran?", "Al"),
     "Al left. Al ran. Bo slept.\nQuestion: Who ran?\nAnswer: Al"),
]


@pytest.mark.parametrize("kind, item, text", REWORDED)
def test_reworded_item_is_recognized(kind, item, text):
    _, forms = pocket.SECRETS[kind](item)
    words = pocket.normal(text)
    assert any(all(pocket.phrases_in(words, pocket.phrase_tree({pocket.normal(p): 0}))
                   for p in form) for form in forms)


def test_each_kind_of_item_has_a_reworded_one():
    assert {kind for kind, _, _ in REWORDED} == set(pocket.SECRETS)


@pytest.mark.parametrize("told, retold", [
    ("Once, Ana ran because it was late.", "It was late, so Ana ran."),
    ("It rained, so Ana left. Ben slept.", "Ana left because it rained. Ben slept.")])
def test_retellings(told, retold):
    forms = [tuple(map(pocket.normal, form)) for form in pocket.retellings(told)]
    sentences = tuple(pocket.normal(s) for s in retold.split(". "))
    assert sentences in forms


def test_gift_from_the_other_side():
    for told in ("gave the hat to", "got the hat from"):
        a, b = ("Ana", "Ben") if "gave" in told else ("Ben", "Ana")
        forms = pocket.beginning_forms([f"{a} {told} {b}. Now {p}" for p in ("Ana", "Ben")])
        assert set(forms) >= {("Ana gave the hat to Ben",), ("Ben got the hat from Ana",)}


def test_no_document_comes_twice(monkeypatch):
    "So training and validation share none."
    monkeypatch.setattr(pocket, "DOCUMENTS", {"letter": (lambda rng: rng.choice("abcdef"), 1)})
    assert sorted(itertools.islice(pocket.documents(random.Random(0)), 6)) == list("abcdef")


# ---------------------------------------------------------------- the folder

def test_killed_run_leaves_no_half_world(tmp_path):
    folder = tmp_path / "world"
    process = subprocess.Popen([sys.executable, "-m", "nanochat_nb.pocket", str(folder)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".world.*/text/shard_00001.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not folder.exists()
    again = pocket.write_pocket(folder, num_chars=20_000)
    assert pocket.read_manifest(folder, again["settings"]) == again


def test_leaky_world_is_not_kept(tmp_path, monkeypatch, capsys):
    question = next(q.text for f in islands.facts()["Arvo"] for q in f.unasked)
    make = pocket.DOCUMENTS["letter"][0]
    monkeypatch.setitem(pocket.DOCUMENTS, "letter", (lambda rng: f"{make(rng)}\n{question}", 9))
    with pytest.raises(UserError, match="was not kept"):
        pocket.write_pocket(tmp_path / "w", num_chars=50_000)
    assert list(tmp_path.iterdir()) == [] and question in capsys.readouterr().out


def test_interrupted_replacement_keeps_the_old_world(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "w")
    old = pocket.load_manifest(world)
    rename = Path.rename

    def stopped(path, target):
        if path.name.startswith(".w.") and Path(target).name == "w" and ".old" not in path.name:
            raise KeyboardInterrupt
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        pocket.write_pocket(tmp_path / "w", num_chars=20_000, seed=1)
    assert pocket.read_manifest(tmp_path / "w", old["settings"]) == old
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_check_notices_a_changed_file(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    path = tmp_path / "w/chat/greetings.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Hello", "Howdy"), encoding="utf-8")
    with pytest.raises(UserError, match="changed after it was made: chat/greetings.jsonl"):
        pocket.pocket(tmp_path / "w", check=True)


def test_older_world_is_made_anew(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    manifest = json.loads((tmp_path / "w/manifest.json").read_text(encoding="utf-8"))
    manifest["settings"]["version"] -= 1
    (tmp_path / "w/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "w/chat/quiz.jsonl").write_text("old", encoding="utf-8")
    made = pocket.write_pocket(tmp_path / "w", num_chars=400_000)
    assert made["settings"]["version"] == pocket.WORLD_VERSION
    assert (tmp_path / "w/chat/quiz.jsonl").read_bytes() == (world / "chat/quiz.jsonl").read_bytes()
    assert pocket.read_manifest(tmp_path / "w", made["settings"]) == made
    assert [p.name for p in tmp_path.iterdir()] == ["w"]  # and nothing half-made beside it


def test_command_makes_and_checks(world, tmp_path, base_dir):
    assert "0 of them in the training part" in run_module("pocket", str(world), "--check").stdout
    item = json.loads((world / "tasks/pocket_sums_test.jsonl").read_text().splitlines()[0])
    folder = plant(world, tmp_path / "w", pocket.sum_forms(item["answer"])[-1][0], "chat")
    done = run_module("pocket", str(folder), "--check")
    assert done.returncode == 2 and "pocket_sums" in done.stdout
    assert "test items are in the training part" in done.stderr and "Traceback" not in done.stderr


def test_check_of_something_else(tmp_path):
    with pytest.raises(UserError, match="has no test items"):
        pocket.find_leaks(tmp_path)
