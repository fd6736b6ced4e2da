"Tokenizer, text and batches: what a notebook shows once is held here on many inputs."
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb import dataset
from nanochat_nb.common import UserError
from nanochat_nb.dataloader import (
    ConversationLoader, PackedLoader, pack, pack_pieces, split_document, validation_batches)
from nanochat_nb.dataset import Documents, download_source, prepare_dataset
from nanochat_nb.tokenizer import SPECIAL_TOKENS, Tokenizer, Utf8Stream, train_tokenizer

settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")

WORDS = "the cat sat on a mat while 12 dogs and 345 birds watched, didn't they? naïve café — 日本 🎉".split()
WORDS += [a + b + c for a in ("ka", "lo", "mi", "tre") for b in ("na", "sto", "rel")
          for c in ("", "dor", "ly", "ing")]


def story(i: int) -> str:
    "A document of 5 to 405 words, the same for the same number."
    return " ".join(WORDS[(i * k * k + k) % len(WORDS)] for k in range(5 + (i * 37) % 401))


STORIES = [story(i) for i in range(150)]
TOKENIZER = Tokenizer.train(STORIES, 340)


def write_shards(folder: Path, shards: list[list], column: str = "text", row_group_size: int = 7) -> Path:
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for i, texts in enumerate(shards):
        pq.write_table(pa.table({column: pa.array(texts, pa.string())}),
                       folder / "text" / f"shard_{i:05d}.parquet", row_group_size=row_group_size)
    return folder


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "data", [STORIES[:60], STORIES[60:100], STORIES[100:120]])


# --- tokenizer -------------------------------------------------------------------------------

@given(st.text())
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not TOKENIZER.special_ids & set(ids)
    assert b"".join(map(TOKENIZER.id_to_bytes, ids)) == text.encode()


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


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_stream_equals_decode(ids):
    stream = Utf8Stream(TOKENIZER)
    assert "".join(map(stream.push, ids)) + stream.flush() == TOKENIZER.decode(ids)


def test_every_code_point():
    for start in range(0, 0x110000, 0x4000):
        text = "".join(chr(c) for c in range(start, start + 0x4000) if not 0xD800 <= c < 0xE000)
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_half_surrogate_becomes_question_mark():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"
    assert TOKENIZER.encode_batch(["a\ud800b"]) == [TOKENIZER.encode("a?b")]


def test_one_megabyte_of_one_character():
    text, start = "a" * 2**20, time.time()
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert time.time() - start < 20


def test_same_texts_same_tokenizer():
    assert Tokenizer.train(STORIES, 340).fingerprint() == TOKENIZER.fingerprint()


def test_special_tokens_come_last():
    assert sorted(TOKENIZER.special_ids) == list(range(340 - 9, 340))
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == sorted(TOKENIZER.special_ids)
    lengths = TOKENIZER.token_bytes()
    assert lengths.dtype == torch.int64 and lengths[-9:].tolist() == [0] * 9 and (lengths[:-9] > 0).all()


def test_file_is_read_alike_by_others(tmp_path):
    path = TOKENIZER.save(tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint() == TOKENIZER.fingerprint()
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.get_vocab_size() == TOKENIZER.vocab_size
    for text in STORIES[:20] + ["I'VE 2024 cats!!\n\n  end  ", "x\r\n\ty", ""]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == TOKENIZER.encode(text) and theirs.decode(ids) == text


def test_file_is_read_alike_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = TOKENIZER.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert theirs(STORIES[3])["input_ids"] == TOKENIZER.encode(STORIES[3])
    assert theirs("<|bos|>")["input_ids"] == [TOKENIZER.bos]


def test_train_tokenizer_saves_reports_and_reuses(folder, base, capsys):
    first = train_tokenizer(str(folder), 340)
    assert {p.name for p in (base / "tokenizer").iterdir()} == {
        "tokenizer.json", "token_bytes.safetensors", "meta.json"}
    report = json.loads((base / "report" / "01-tokenizer.json").read_text())
    assert report["results"]["vocab_size"] == 340 == first.vocab_size
    assert report["results"]["validation_bytes_per_token"] > 1.5
    assert "reusing" not in capsys.readouterr().out
    assert train_tokenizer(str(folder), 340).fingerprint() == first.fingerprint()
    assert "reusing" in capsys.readouterr().out
    assert train_tokenizer(str(folder), 300).vocab_size == 300        # other settings
    (base / "tokenizer" / "tokenizer.json").write_text("{")           # damaged
    assert train_tokenizer(str(folder), 300).vocab_size == 300
    assert train_tokenizer(str(folder), 60000).vocab_size < 60000     # too little text
    assert "too small" in capsys.readouterr().out


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match="python -m nanochat_nb.tokenizer"):
        Tokenizer.load()
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(["x"], 200)
    with pytest.raises(UserError, match="python -m nanochat_nb.dataset --source pocket"):
        train_tokenizer("nowhere")
    for content in ("", "{}", tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()):
        with pytest.raises(UserError, match="make one with"):
            Tokenizer(content)


# --- documents -------------------------------------------------------------------------------

def test_documents_are_read_like_a_list(folder):
    train, val = Documents(folder), Documents(folder / "text", "val")
    assert (len(train), len(val)) == (100, 20)
    assert list(train) == STORIES[:100] == train.read(0, 100) and list(val) == STORIES[100:120]
    for start, stop in ((0, 1), (55, 65), (6, 8), (59, 60), (60, 61), (99, 200), (5, 5), (9, 3)):
        assert train.read(start, stop) == STORIES[:100][start:stop] == train[start:stop]
    assert train[-1] == STORIES[99]


def test_nulls_are_empty_documents(tmp_path):
    folder = write_shards(tmp_path, [["a", None, "b"], ["c"]])
    assert list(Documents(folder)) == ["a", "", "b"]


@pytest.mark.parametrize("shards, column, match", [
    ([], "text", "found none"),
    ([["a"]], "text", "only shard_00000.parquet"),
    ([["a"], ["b"]], "content", "no column `text`, only content"),
    ([[], ["b"]], "text", "hold no documents"),
])
def test_bad_folders(tmp_path, shards, column, match):
    with pytest.raises(UserError, match=match):
        Documents(write_shards(tmp_path, shards, column))


def test_truncated_and_foreign_files_are_named(folder):
    path = folder / "text" / "shard_00001.parquet"
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="shard_00001.parquet is not a readable parquet file"):
            Documents(folder)
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])  # the footer is whole, the pages are not
    with pytest.raises(UserError, match="shard_00001.parquet"):
        list(Documents(folder))


def test_column_of_another_type(tmp_path):
    write_shards(tmp_path, [["a"], ["b"]])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "text" / "shard_00000.parquet")
    with pytest.raises(UserError, match="int64, expected strings"):
        Documents(tmp_path)


def test_prepare_folder(folder, capsys):
    assert prepare_dataset(str(folder)) == folder
    assert "100 documents to learn from in 2 shards, 20 for validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither a folder nor one of pocket, climbmix"):
        prepare_dataset("climbmx")


# --- the hub, played by a small server -------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    "The few addresses of the hub that a download touches; `spoil` changes what is sent for a path."
    files, spoil, requests, busy = {}, {}, [], {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.requests.append(path)
        if "/revision/" in path:
            return self.send({"id": "x", "sha": self.commit})
        if "/tree/" in path:
            return self.send([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40,
                               "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                                       "pointerSize": 130}} for name, data in self.files.items()])
        name = path.split(f"/resolve/{self.commit}/")[-1]
        if self.busy.get(name, 0):
            self.busy[name] -= 1
            return self.send({"error": "busy"}, 503)
        data = self.spoil.get(name, self.files.get(name))
        if data is None:
            return self.send({"error": "Entry not found"}, 404)
        self.send(data)

    def send(self, data, status=200):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + hashlib.sha256(body).hexdigest() + '"')
        self.send_header("X-Repo-Commit", self.commit)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "hub", [STORIES[i * 10:i * 10 + 10] for i in range(4)])
    Hub.files = {p.name: p.read_bytes() for p in sorted((source / "text").iterdir())}
    Hub.spoil, Hub.requests, Hub.busy = {}, [], {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(dataset.time, "sleep", lambda seconds: None)
    yield Hub
    server.shutdown()
    server.server_close()


def test_download(hub, base):
    folder = download_source("climbmix", num_shards=2, num_workers=2)
    names = [p.name for p in sorted((folder / "text").iterdir())]
    assert names == ["shard_00000.parquet", "shard_00001.parquet", "shard_00003.parquet"]  # the last: validation
    assert list(Documents("climbmix")) == STORIES[:20] and list(Documents("climbmix", "val")) == STORIES[30:40]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["commit"] == hub.commit
    assert manifest["files"][names[0]]["sha256"] == hashlib.sha256(hub.files[names[0]]).hexdigest()
    assert not (folder / "download").exists()
    hub.requests.clear()
    download_source("climbmix", num_shards=2)
    assert hub.requests == []                       # all there: no network
    (folder / "text" / names[1]).unlink()
    download_source("climbmix", num_shards=3)       # the lost one and a new one
    assert {r.split("/")[-1] for r in hub.requests if "/resolve/" in r} == {names[1], "shard_00002.parquet"}


def test_failed_downloads_are_counted_and_not_kept(hub, base):
    whole = hub.files["shard_00001.parquet"]
    hub.files["shard_00002.parquet"] = b"x"
    hub.spoil["shard_00001.parquet"] = bytes(len(whole))        # right size, wrong content
    with pytest.raises(UserError, match="2 of the 4 shards to fetch from climbmix are missing; the first "
                                        "is shard_00001.parquet .*damaged"):
        download_source("climbmix")
    there = {p.name for p in (base / "data" / "climbmix").rglob("*.parquet")}
    assert there == {"shard_00000.parquet", "shard_00003.parquet"}
    hub.spoil.clear()
    hub.files["shard_00002.parquet"] = whole
    download_source("climbmix")
    assert len(Documents("climbmix")) == 30


def test_missing_shard(hub, base):
    hub.spoil["shard_00001.parquet"] = None
    with pytest.raises(UserError, match="1 of the 4 shards"):
        download_source("climbmix")
    assert sum(request.endswith("shard_00001.parquet") for request in hub.requests) == 1  # not asked again


def test_busy_server_is_asked_again(hub, base):
    hub.busy["shard_00001.parquet"] = 3
    download_source("climbmix")
    assert len(Documents("climbmix")) == 30 and hub.busy == {"shard_00001.parquet": 0}


def test_unreachable_hub_is_one_line(base, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot get karpathy/climbmix.* from http://127.0.0.1:9") as error:
        download_source("climbmix", num_shards=1)
    assert "\n" not in str(error.value)


# --- batches ---------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 50)), st.integers(50, 80))
def test_pack_keeps_every_item_once(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    assert sum(sum(lengths[i] for i in row) * 2 <= capacity for row in rows) <= 1  # else two rows would be one


def test_pack_refuses_what_does_not_fit():
    assert pack([], 4) == []
    for lengths in ([5], [0], [1, 9]):
        with pytest.raises(ValueError, match="do not lie in"):
            pack(lengths, 4)


@given(st.lists(st.integers(1, 99), max_size=100), st.integers(1, 20))
def test_split_document_loses_nothing(ids, T):
    pieces = split_document(ids, 0, T)
    assert all(piece[0] == 0 and 2 <= len(piece) <= T + 1 for piece in pieces)
    assert [i for piece in pieces for i in piece[1:]] == ids


@given(st.lists(st.integers(1, 150), min_size=1, max_size=60), st.sampled_from([2, 9, 65, 100]))
def test_pack_pieces_keeps_every_token_and_fills_rows(lengths, capacity):
    documents = [[(i, k) for k in range(n)] for i, n in enumerate(lengths)]
    pieces = [piece for ids in documents for piece in split_document(ids, "bos", capacity - 1)]
    rows = pack_pieces(pieces, capacity, "bos", 1, 2)
    assert sorted(t for row in rows for piece in row for t in piece[1:]) == sorted(sum(documents, []))
    room = [capacity - sum(map(len, row)) for row in rows]
    assert min(room) >= 0 and sum(r >= max(2, capacity // 32) for r in room) <= 1
    for row, left in zip(rows, room):
        assert all(piece[0] == "bos" and len(piece) > 1 for piece in row)
        for piece in row:  # a bos, or padding, follows only where a document ends
            i, k = piece[-1]
            assert k == lengths[i] - 1 or (piece is row[-1] and left == 0)
    assert rows == pack_pieces(pieces, capacity, "bos", 1, 2)


def take(loader, n):
    return [next(loader) for _ in range(n)]


def make(B, T=32, window=16, **kwargs):
    return PackedLoader(STORIES, TOKENIZER, B, T, window=window, **kwargs)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others) for a, b in zip(*pair))


def test_rows_are_true_to_the_text():
    loader, seen = make(4, window=1024), []
    rows = len(loader.rows(0, 0)[0])
    for inputs, targets in take(loader, rows // 4):
        assert inputs.shape == targets.shape == (4, 32) and inputs.dtype == targets.dtype == torch.int64
        assert (inputs[:, 0] == TOKENIZER.bos).all()
        kept = targets[:, :-1] >= 0
        assert torch.equal(inputs[:, 1:][kept], targets[:, :-1][kept])
        seen += targets[targets >= 0].tolist()
    total = sum(len(ids) for ids in TOKENIZER.encode_batch(STORIES))
    words = sum(id != TOKENIZER.bos for id in seen)
    assert 0.95 * total < words <= total  # an epoch less the rows that did not fill a batch


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_rows_at_any_world_size(world_size):
    B, steps = 12 // world_size, 130  # 130 × 12 rows: over the edge of an epoch
    whole_loader = make(12)
    whole = take(whole_loader, steps)
    assert whole_loader.epoch >= 1
    ranks = [take(make(B, rank=r, world_size=world_size), steps) for r in range(world_size)]
    joined = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)]
    assert same(joined, whole)


def test_resume_is_exact():
    loader = make(5)
    batches = []
    states = []
    while loader.epoch < 2:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(next(loader))
    batches += take(loader, 3)
    for i in range(0, len(states), 9):
        assert same(take(make(5, state=states[i]), 3), batches[i:i + 3])
    edge = next(i for i, state in enumerate(states) if state["epoch"] == 1)
    for i in range(edge - 2, edge + 2):
        assert same(take(make(5, state=states[i]), 3), batches[i:i + 3])


def test_resume_on_another_number_of_ranks():
    one = make(6)
    take(one, 7)
    state, expected = one.state_dict(), take(one, 4)
    ranks = [take(make(2, rank=r, world_size=3, state=state), 4) for r in range(3)]
    assert same([tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)], expected)


def test_epochs_differ_and_batches_do_not_alias():
    loader = make(4)
    first, second = take(loader, 2)
    assert not torch.equal(first[0], second[0])
    epochs = [np.concatenate([loader.rows(e, w)[0] for w in range(loader.num_windows)]) for e in (0, 1)]
    assert sorted(map(tuple, epochs[0])) != list(map(tuple, epochs[0])) != list(map(tuple, epochs[1]))


def test_small_and_empty_data():
    inputs, _ = next(PackedLoader(["tiny"], TOKENIZER, 8, 16))
    assert inputs.shape == (8, 16) and len(set(map(tuple, inputs.tolist()))) == 1
    with pytest.raises(UserError, match="no documents"):
        PackedLoader([], TOKENIZER, 1, 8)
    with pytest.raises(UserError, match="nothing to learn from"):
        next(PackedLoader(["", ""], TOKENIZER, 1, 8))
    late = PackedLoader(STORIES[:3], TOKENIZER, 2, 8, state={"epoch": 5, "window": 99, "row": 9999})
    assert next(late)[0].shape == (2, 8) and late.epoch == 6


def test_a_damaged_shard_ends_the_loader_with_its_name(folder):
    documents = Documents(folder)
    (folder / "text" / "shard_00001.parquet").write_bytes(b"gone")
    with pytest.raises(UserError, match="shard_00001"):
        take(PackedLoader(documents, TOKENIZER, 4, 16, window=10), 500)


@pytest.mark.parametrize("max_tokens", [-1, 0, 1000, 10**9])
def test_validation_is_the_same_set_of_rows(max_tokens):
    def rows(B, world_size):
        batches = [list(validation_batches(STORIES, TOKENIZER, B, 32, max_tokens, r, world_size))
                   for r in range(world_size)]
        assert len({len(b) for b in batches}) == 1  # ranks stay in step
        return sorted((tuple(i), tuple(t)) for rank in batches for inputs, targets in rank
                      for i, t in zip(inputs.tolist(), targets.tolist()) if any(x >= 0 for x in t))
    expected = rows(1, 1)
    assert all(rows(B, W) == expected for B, W in ((8, 1), (5, 2), (3, 4)))
    if max_tokens == 1000:
        assert len(expected) == 32


def render(conversation):
    n, said = conversation
    return [TOKENIZER.bos] + [n] * (n + said), [0] * (1 + n) + [1] * said


CONVERSATIONS = [(1 + i % 20, i % 9) for i in range(60)]


def chats(B, **kwargs):
    return ConversationLoader(CONVERSATIONS, render, B, 24, bos_pad_id=TOKENIZER.bos, window=25, **kwargs)


def test_conversations():
    loader, learned = chats(4), 0
    assert 20 < loader.rows_per_epoch < 60
    for window in range(loader.num_windows):
        inputs, targets = loader.rows(0, window)
        assert (inputs[:, 0] == TOKENIZER.bos).all()
        assert (inputs[:, 1:][targets[:, :-1] >= 0] == targets[:, :-1][targets[:, :-1] >= 0]).all()
        learned += (targets >= 0).sum()
    assert learned == sum(min(said, 24 - n) for n, said in CONVERSATIONS)  # cut at T + 1 = 25 tokens
    ranks = [take(chats(2, rank=r, world_size=2), 30) for r in range(2)]
    whole = take(loader, 30)
    assert loader.epoch >= 1
    assert same([tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)], whole)
    resumed = chats(4)
    take(resumed, 11)
    assert same(take(chats(4, state=resumed.state_dict()), 5), whole[11:16])


def test_rows_per_epoch_is_exact_for_one_window():
    loader = ConversationLoader(CONVERSATIONS, render, 1, 24)
    assert loader.rows_per_epoch == len(loader.rows(0, 0)[0])
    take(loader, loader.rows_per_epoch)
    assert loader.row == loader.rows_per_epoch and loader.epoch == 0
    with pytest.raises(UserError, match="no conversations"):
        ConversationLoader([], render, 1, 24)
