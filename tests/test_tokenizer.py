"Text to ids and back: every promise of lesson 1 on many inputs, and against others' programs."
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import STORIES

from nanochat_nb.common import UserError
from nanochat_nb.tokenizer import (
    SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, Utf8Stream, bytes_per_token, halves, learn_tokens,
    resolve_data_dir, tokenizer_json, train_tokenizer)

settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")

TOKENIZER = Tokenizer.train(STORIES, 380)
THEIRS = tokenizers.Tokenizer.from_str(TOKENIZER.json)
THEIRS.encode_special_tokens = True  # special names are text, as with us

# text that looks for the seams of the split pattern
tricky = st.lists(st.one_of(
    st.text(max_size=8),
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "'s", "'LL", "'ſ", "123", "٣٤٥", "½²", " ", "  ", "\n", "\r\n",
                     "\t", "\u3000", "\x85", "\ufeff", "!!", "e\u0301", "日本", "🎉", "\x00", "\U0010ffff"]),
), max_size=12).map("".join)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    for i, texts in enumerate((STORIES[:60], STORIES[60:100], STORIES[100:120])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"data/text/shard_{i:05d}.parquet", row_group_size=7)
    return tmp_path / "data"


def code_points():
    return (c for c in range(0x110000) if not 0xD800 <= c < 0xE000)


# --- there and back --------------------------------------------------------------------------

@given(tricky)
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(map(TOKENIZER.id_to_bytes, ids)) == text.encode()
    assert TOKENIZER.token_bytes()[ids].sum().item() == len(text.encode())


def test_every_code_point_alone_and_among_others():
    points = [chr(c) for c in code_points()]
    for before, after in (("", ""), (" a", "1")):
        texts = [before + point + after for point in points]
        for text, ids in zip(texts, TOKENIZER.encode_batch(texts), strict=True):
            assert TOKENIZER.decode(ids) == text


@given(st.binary(max_size=200))
def test_random_bytes_decode_as_python_decodes_them(data):
    ids = [TOKENIZER.encode("a")[0] - ord("a") + byte for byte in data]  # ids of bytes are in order
    assert TOKENIZER.decode(ids) == data.decode("utf-8", errors="replace")


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_stream_equals_decode(ids):
    stream = Utf8Stream(TOKENIZER)
    assert "".join(map(stream.push, ids)) + stream.flush() == TOKENIZER.decode(ids)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "1", "!", "é", "\t ", " \n", "\u0301", "<|bos|>"])
def test_one_megabyte_of_one_thing(unit):
    text = (unit * 2**20)[:2**20]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text, kept", [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("x\ud83c", "x\ufffd"),
                                        ("\ud83c\udf89", "🎉"), ("🎉\ud83c", "🎉\ufffd")])
def test_surrogates(text, kept):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == kept
    assert TOKENIZER.encode_batch([text]) == [TOKENIZER.encode(kept)]
    assert Tokenizer.train([*STORIES, text], 300).decode([97]) == "a"


def test_ids_outside_the_vocabulary_are_errors():
    for id in (-1, TOKENIZER.vocab_size):
        with pytest.raises(IndexError):
            TOKENIZER.decode([id])


# --- the same ids as everybody's --------------------------------------------------------------

@settings(max_examples=300)
@given(tricky)
def test_ids_are_those_of_tokenizers(text):
    assert TOKENIZER.encode(text) == THEIRS.encode(text).ids


@settings(max_examples=300)
@given(tricky)
def test_the_pattern_cuts_as_gpt_4s_first_did_but_for_digits(text):
    published = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
    assert regex.findall(SPLIT_PATTERN, text) == regex.findall(published.replace("{1,3}", "{1,2}"), text)
    assert "".join(regex.findall(SPLIT_PATTERN, text)) == text


def test_ids_are_those_of_tokenizers_for_all_of_unicode():
    points = [chr(c) for c in code_points()]
    for k, glue in enumerate((" ", "1", "'")):
        texts = [glue.join(points[i:i + 97]) for i in range(k, len(points), 97)]
        ours, theirs = TOKENIZER.encode_batch(texts), THEIRS.encode_batch(texts)
        assert ours == [e.ids for e in theirs]


@settings(max_examples=30)
@given(tricky)
def test_ids_are_those_of_the_definition(text):
    "Each piece of the pattern on its own; the earliest learned pair first."
    stored = json.loads(TOKENIZER.json)["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(stored["merges"])}
    spelled = {ord(byte): name for byte, name in zip(map(chr, range(256)), stored["vocab"])}
    expected = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [spelled[byte] for byte in piece.encode()]
        while pairs := [p for p in zip(parts, parts[1:]) if p in ranks]:
            best = min(pairs, key=ranks.get)
            at = next(i for i in range(len(parts)) if tuple(parts[i:i + 2]) == best)
            parts[at:at + 2] = ["".join(best)]
        expected += [stored["vocab"][part] for part in parts]
    assert TOKENIZER.encode(text) == expected


def test_arrays_and_lists_agree():
    texts = ["", *STORIES[:5], "", "\n"]
    arrays = TOKENIZER.encode_arrays(texts)
    assert all(a.dtype == np.int32 for a in arrays)
    assert [a.tolist() for a in arrays] == TOKENIZER.encode_batch(texts) == [*map(TOKENIZER.encode, texts)]
    assert TOKENIZER.encode_arrays([]) == []


def test_file_is_read_alike_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = TOKENIZER.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in (*STORIES[:5], "I'VE 2024 cats!!\n\n  end  "):
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs("<|bos|>")["input_ids"] == [TOKENIZER.bos]  # there the names are looked for


def test_threads_share_a_tokenizer():
    expected, found = TOKENIZER.encode_batch(STORIES), []
    threads = [threading.Thread(target=lambda: found.append(TOKENIZER.encode_batch(STORIES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


# --- special tokens --------------------------------------------------------------------------

@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " ", "a", "<|bos", "\n"])))
def test_text_cannot_forge_special_tokens(parts):
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.encode_batch([text]) == [ids]
    assert not TOKENIZER.special_ids & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_cannot_be_learned():
    tokenizer = Tokenizer.train(["".join(SPECIAL_TOKENS) * 50], 400)
    for name in SPECIAL_TOKENS:
        assert tokenizer.special(name) not in tokenizer.encode(name)
        assert tokenizer.decode([tokenizer.special(name)]) == name
        assert tokenizer.id_to_bytes(torch.tensor(tokenizer.special(name))) == b""
    ordinary = {tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size - 9)}
    assert not {name.encode() for name in SPECIAL_TOKENS} & ordinary


def test_special_tokens_come_last_and_have_no_bytes():
    assert sorted(TOKENIZER.special_ids) == list(range(380 - 9, 380))
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == sorted(TOKENIZER.special_ids)
    assert THEIRS.token_to_id("<|bos|>") == TOKENIZER.bos
    lengths = TOKENIZER.token_bytes()
    assert lengths.dtype == torch.int64 and lengths[-9:].tolist() == [0] * 9 and (lengths[:-9] > 0).all()


# --- training --------------------------------------------------------------------------------

def test_same_texts_same_tokenizer_whatever_the_number_of_threads():
    code = ("import sys, json; from nanochat_nb.tokenizer import Tokenizer; "
            "print(Tokenizer.train(json.load(sys.stdin), 380).fingerprint())")
    for threads in ("1", "3"):
        run = subprocess.run([sys.executable, "-c", code], input=json.dumps(STORIES), capture_output=True, text=True,
                             env={**os.environ, "RAYON_NUM_THREADS": threads})
        assert run.stdout.strip() == TOKENIZER.fingerprint(), run.stderr


def test_tokens_are_those_of_counting_anew_each_time():
    words = {}
    for text in STORIES[:20]:
        for piece in regex.findall(SPLIT_PATTERN, text):
            words[piece] = words.get(piece, 0) + 1
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 300:
        counts = {}
        for word, split in parts.items():
            for pair in zip(split, split[1:]):
                counts[pair] = counts.get(pair, 0) + words[word]
        best = min(counts, key=lambda p: (-counts[p], tokens.index(p[0]), tokens.index(p[1])))
        tokens.append(best[0] + best[1])
        for split in parts.values():
            i = 0
            while i + 1 < len(split):
                if (split[i], split[i + 1]) == best:
                    split[i:i + 2] = [tokens[-1]]
                i += 1
    assert learn_tokens(STORIES[:20], 300) == tokens
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens[256:]:
        left, right = halves(token, ranks)
        assert left + right == token and max(ranks[left], ranks[right]) < ranks[token]


def test_errors_of_the_documents_reach_the_caller():
    def texts():
        yield from STORIES
        raise UserError("shard 7 is damaged")
    with pytest.raises(UserError, match="shard 7"):
        Tokenizer.train(texts(), 300)


def test_train_tokenizer_saves_reports_and_reuses(folder, base, capsys):
    first = train_tokenizer(str(folder), 340)
    assert {p.name for p in (base / "tokenizer").iterdir()} == {
        "tokenizer.json", "token_bytes.safetensors", "meta.json"}
    assert Tokenizer.load().fingerprint() == first.fingerprint()
    report = json.loads((base / "report" / "01-tokenizer.json").read_text())
    assert report["results"]["vocab_size"] == 340 == first.vocab_size
    assert report["results"]["documents"] == 100
    assert report["results"]["characters"] == sum(map(len, STORIES[:100]))  # never the validation shard
    assert report["results"]["validation_bytes_per_token"] == round(bytes_per_token(first, STORIES[100:120]), 4)
    assert "reusing" not in capsys.readouterr().out
    assert train_tokenizer(str(folder), 340).fingerprint() == first.fingerprint()
    assert "reusing" in capsys.readouterr().out
    assert train_tokenizer(str(folder), 300).vocab_size == 300        # other settings
    (base / "tokenizer" / "tokenizer.json").write_text("{")           # damaged
    assert train_tokenizer(str(folder), 300).vocab_size == 300
    (base / "tokenizer" / "token_bytes.safetensors").write_bytes(b"")
    assert train_tokenizer(str(folder), 300).vocab_size == 300        # mended
    assert (base / "tokenizer" / "token_bytes.safetensors").stat().st_size > 300
    (base / "tokenizer" / "meta.json").write_text("[]")
    assert train_tokenizer(str(folder), 300).vocab_size == 300
    assert train_tokenizer(str(folder), 60000).vocab_size < 60000     # too little text
    assert "too small" in capsys.readouterr().out


def test_shards_that_come_later_change_nothing(folder, capsys):
    size = sum(map(len, STORIES[:60]))
    first = train_tokenizer(str(folder), 340, max_chars=size)
    (folder / "text" / "shard_00002.parquet").rename(folder / "text" / "shard_00009.parquet")  # validation stays last
    pq.write_table(pa.table({"text": ["something else entirely"] * 99}), folder / "text" / "shard_00005.parquet")
    assert train_tokenizer(str(folder), 340, max_chars=size).fingerprint() == first.fingerprint()
    assert "reusing" in capsys.readouterr().out
    assert train_tokenizer(str(folder), 340).fingerprint() != first.fingerprint()


def test_a_killed_training_leaves_the_old_tokenizer(folder, base):
    first = train_tokenizer(str(folder), 340)
    code = f"""
import os, nanochat_nb.tokenizer as t
save = t.atomic_write
def dying(path, content):
    if str(path).endswith("tokenizer.json"):
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return save(path, content)
t.atomic_write = dying
t.train_tokenizer({str(folder)!r}, 300)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert Tokenizer.load().fingerprint() == first.fingerprint()
    assert train_tokenizer(str(folder), 300).vocab_size == 300        # and it is made again


def test_bad_files_and_settings_are_one_line():
    with pytest.raises(UserError, match="python -m nanochat_nb.tokenizer"):
        Tokenizer.load()
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(["x"], 200)
    with pytest.raises(UserError, match="python -m nanochat_nb.dataset --source pocket"):
        train_tokenizer("nowhere")
    good = json.loads(TOKENIZER.json)
    gap = good["model"] | {"vocab": good["model"]["vocab"] | {"Ġzz": 10**6}}
    vocab = {token: i for i, token in enumerate(t for t in good["model"]["vocab"] if t != "!")}
    ends = [token | {"id": token["id"] - 1} for token in good["added_tokens"]]
    prefix = json.dumps(good["pre_tokenizer"]).replace('"add_prefix_space": false', '"add_prefix_space": true')
    for content in ("", "{}", "[]", tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(),
                    json.dumps(good | {"added_tokens": good["added_tokens"][1:]}),
                    json.dumps(good | {"added_tokens": []}), json.dumps(good | {"model": gap}),
                    json.dumps(good | {"model": good["model"] | {"vocab": vocab}, "added_tokens": ends}),
                    json.dumps(good | {"normalizer": {"type": "NFC"}}),
                    json.dumps(good | {"pre_tokenizer": json.loads(prefix)}),
                    json.dumps(good | {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0,
                                                      "direction": "Right"}}),
                    tokenizer_json(learn_tokens(STORIES, 300), special_tokens=("<|bos|>",))):
        with pytest.raises(UserError, match="make one with"):
            Tokenizer(content)


def test_files_written_otherwise_are_read(tmp_path):
    theirs = tokenizers.Tokenizer.from_str(TOKENIZER.json)
    for content in (theirs.to_str(pretty=True).encode(), b"\xef\xbb\xbf" + TOKENIZER.json.encode(),
                    TOKENIZER.json.replace("\n", "\r\n").encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        assert Tokenizer.load(tmp_path).encode(STORIES[2]) == TOKENIZER.encode(STORIES[2])
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="make one with"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("texts, size", [("abc", 300), (["abc"], 100), (["abc"], 2**31)])
def test_learn_tokens_refuses_nonsense(texts, size):
    with pytest.raises(ValueError, match="expected documents"):
        learn_tokens(texts, size)


def test_names_of_folders(base, folder, monkeypatch):
    (base / "data" / "stories").mkdir(parents=True)
    assert resolve_data_dir("stories") == base / "data" / "stories"
    assert resolve_data_dir(folder) == folder
    monkeypatch.chdir(folder)
    assert resolve_data_dir(".") == Path(".") and resolve_data_dir("..") == Path("..")
    assert resolve_data_dir("text") == Path("text")
    for name in ("", "nowhere", "text/nowhere"):
        with pytest.raises(UserError, match="--source pocket"):
            resolve_data_dir(name)


def test_command_line(folder, base):
    def run(*flags):
        return subprocess.run([sys.executable, "-m", "nanochat_nb.tokenizer", *flags], capture_output=True, text=True)
    good = run("--data_dir", str(folder), "--vocab_size", "350", "--max_chars", "20000")
    assert good.returncode == 0 and "350 tokens from 20,000 characters" in good.stdout, good.stderr
    for flags in (["--data_dir", "nowhere"], ["--data_dir", str(folder), "--vocab_size", "1"],
                  ["--data_dir", str(folder), "--vocab_size", "5000000000"],
                  ["--data_dir", str(folder), "--max_chars", "0"]):
        bad = run(*flags)
        assert bad.returncode != 0 and "Traceback" not in bad.stderr and len(bad.stderr.strip().splitlines()) == 1


# --- the page --------------------------------------------------------------------------------

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs Chromium")
def test_the_playground_of_the_page_in_a_browser():
    playwright = pytest.importorskip("playwright.sync_api")
    notebook = nbformat.read(Path(__file__).parent.parent / "nbs/01_tokenizer.ipynb", 4)
    html = next(output.data["text/html"] for cell in notebook.cells for output in cell.get("outputs", [])
                if "token-playground" in output.get("data", {}).get("text/html", ""))
    merges = json.loads(regex.search(r'application/json">(.*?)</script>', html)[1])
    tokens = [bytes([b]) for b in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    expected = Tokenizer(tokenizer_json(tokens))
    rng = random.Random(0)
    texts = ["", "It's 12345 lighthouses\n\n  <b>bold</b> & <|bos|>", "naïve café 日本 🎉\t!", "don'T  stop\r\n1.5e-3", " \ufeffa \x85\u3000b",
             "MERGES TEXT </textarea>"]
    texts += ["".join(rng.choice(["the ", "ing", "7", "\n", " ", "é", "本", "!?", "'s", "&", "<i>"]) for _ in range(40))
              for _ in range(10)]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_content(f"<!doctype html><meta charset='utf-8'>{html}")
        for text in texts:
            page.fill("textarea", text)
            text = page.input_value("textarea")  # a textarea keeps \n where \r\n was put in
            ids = page.eval_on_selector_all(".tokens span", "spans => spans.map(s => +s.dataset.id)")
            assert ids == expected.encode(text), text
            assert f"{len(ids)} tokens" in page.inner_text("[role=status]")
            assert page.locator(".tokens b, .tokens i").count() == 0  # what is typed is shown, not run
        browser.close()
        assert not errors
