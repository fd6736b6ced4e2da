"Tokenizer, text and batches: what a notebook shows once is held here on many inputs."
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.dataloader import (
    ConversationLoader, PackedLoader, pack, pack_pieces, split_document, validation_batches)
from nanochat_nb.dataset import Documents, prepare_dataset
from nanochat_nb.tokenizer import Tokenizer

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
