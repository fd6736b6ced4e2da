"Documents from shards: what a notebook shows once is held here on many inputs."
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_module
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import STORIES

from nanochat_nb import dataset
from nanochat_nb.common import UserError
from nanochat_nb.dataset import (
    Documents,
    find_text,
    near_copies,
    prepare_dataset,
    share_of_rank,
    text_statistics,
)


def write_shards(folder: Path, shards: list[list], column: str = "text",
                 row_group_size: int = 7) -> Path:
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


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    folder = write_shards(tmp_path, [["a"], ["b"]])
    texts = pa.array([b"caf\xe9 au lait"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), folder / "text" / "shard_00000.parquet")
    for read in (lambda: find_text(folder, "lait"), lambda: list(Documents(folder))):
        with pytest.raises(UserError, match="shard_00000.parquet cannot be read"):
            read()


def test_column_of_another_type(tmp_path):
    write_shards(tmp_path, [["a"], ["b"]])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "text" / "shard_00000.parquet")
    with pytest.raises(UserError, match="int64, expected strings"):
        Documents(tmp_path)


def test_row_groups_too_large_to_be_read_whole_are_named(tmp_path, monkeypatch):
    folder, path = write_shards(tmp_path, [["a"], ["b"]]), tmp_path / "text" / "shard_00000.parquet"
    monkeypatch.setattr(dataset, "MAX_ROW_GROUP_BYTES", 10_000)
    rows = {"text": ["some text"] * 9 + ["x" * 20_000],
            "other": [str(i) * 9_000 for i in range(10)]}     # another column may be as large as it is
    pq.write_table(pa.table(rows), path, row_group_size=9)
    with pytest.raises(UserError, match="row group 1 of .*shard_00000.parquet holds 0.0 GB of text "
                                        "and is read whole.*row_group_size=1000"):
        Documents(folder)
    with pytest.raises(UserError, match="row group 1"):
        find_text(folder, "some")
    rows["text"].pop(), rows["other"].pop()
    pq.write_table(pa.table(rows), path)
    assert len(Documents(folder)) == 9


def test_prepare_folder(folder, capsys):
    assert prepare_dataset(str(folder)) == folder
    assert "100 documents to learn from in 2 shards, 20 for validation" in capsys.readouterr().out
    for unknown in ("climbmx", "", str(folder / "text" / "shard_00000.parquet")):
        with pytest.raises(UserError, match="neither a folder nor one of pocket, climbmix"):
            prepare_dataset(unknown)


def test_a_folder_by_its_name(base):
    mine = write_shards(base / "data" / "mine", [["a"], ["b"]])
    assert prepare_dataset("mine") == mine        # the name that --data_dir and --find know


def test_empty_documents_are_described(tmp_path):
    folder = write_shards(tmp_path, [["", None, ""], [""]])
    assert "longest 0\n  made of: nothing\n" in dataset.describe_text(folder)


# --- documents by rank, statistics, search ---------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 4),
       st.integers(1, 12))
def test_every_rank_has_its_share(tmp_path_factory, sizes, row_group_size, world_size):
    "At any number of ranks, shards and row groups: each document once, or an error at once."
    shards = [[f"{i} {k}" for k in range(size)] for i, size in enumerate(sizes)]
    documents = Documents(write_shards(tmp_path_factory.mktemp("d"), [*shards, ["val"]],
                                       row_group_size=row_group_size))
    if len(documents) < world_size:
        for rank in range(world_size):         # all of them: nobody waits for a rank that ended
            with pytest.raises(UserError, match="cannot be shared out over"):
                documents.of_rank(rank, world_size)
        return
    shares = [list(documents.of_rank(rank, world_size)) for rank in range(world_size)]
    assert sum(shares, []) == sum(shards, []) and all(shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_that_do_not_exist():
    for rank, world_size in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(UserError, match="must lie from 0"):
            share_of_rank(9, rank, world_size)


def test_a_rank_reads_its_own_row_groups_only(tmp_path, monkeypatch):
    documents, read = Documents(write_shards(tmp_path, [list("abcdefgh"), ["v"]], row_group_size=1)), []
    monkeypatch.setattr(dataset, "read_row_group",
                        lambda file, group, path: read.append(group) or ["x"])
    list(documents.of_rank(2, 4))
    assert read == [4, 5]


def test_a_sample_comes_from_everywhere(tmp_path):
    texts = [str(i) for i in range(1000)]
    documents = Documents(write_shards(tmp_path, [texts[:300], texts[300:], ["v"]], row_group_size=64))
    sample = list(map(int, documents.sample(100)))
    assert len(sample) == len(set(sample)) == 100 and min(sample) < 50 and max(sample) > 900
    assert documents.sample(1000) == texts and len(documents.sample(3)) == 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab\u00e9\u65e5 "), max_size=12), min_size=1, max_size=20),
       st.text(st.sampled_from("ab\u00e9\u65e5"), min_size=1, max_size=3))
def test_search_counts_what_python_counts(tmp_path_factory, texts, needle):
    folder = write_shards(tmp_path_factory.mktemp("d"), [[*texts, None], texts[:2]], row_group_size=3)
    found, everything = find_text(folder, needle, max_hits=2), texts + texts[:2]
    assert found["documents"] == sum(needle in text for text in everything)
    assert found["occurrences"] == sum(text.count(needle) for text in everything)
    assert found["in_validation"] == sum(needle in text for text in texts[:2])
    assert len(found["hits"]) == min(found["documents"], 2)
    for shard, row, excerpt in found["hits"]:
        assert needle in excerpt
        assert needle in pq.read_table(folder / "text" / shard)["text"][row].as_py()


def test_search_on_the_command_line(tmp_path, base_dir):
    folder = write_shards(tmp_path, [["the cat", "a dog"], ["the cat sat, the cat ran"]], row_group_size=1)
    result = run_module("dataset", "--source", folder, "--find", "the cat")
    assert result.returncode == 0, result.stderr
    assert "'the cat': 3 times in 2 documents, 1 of them for validation" in result.stdout
    assert "shard_00001.parquet row 0: … the cat sat, the cat ran …" in result.stdout
    assert not (base_dir / "report").exists()
    with pytest.raises(UserError, match="no data folder 'nowhere'"):
        prepare_dataset("nowhere", find="x")


def test_statistics(tmp_path, capsys):
    found = text_statistics(["Ärger", "мир", "日本 42!", "", "Ärger", "e\u0301\ud800"])
    assert found["lengths"] == [0, 3, 3, 5, 5, 6] and found["exact_copies"] == 1
    assert found["scripts"] == {"latin": 11, "cyrillic": 3, "cjk": 2, "digit": 2, "space": 1,
                                "combining": 1, "sign": 2}
    assert text_statistics([])["documents"] == 0
    prepare_dataset(str(write_shards(tmp_path, [["some words"] * 3, ["v"]], row_group_size=1)))
    assert "copies of an earlier one: 2 exact, 2 at least half the same" in capsys.readouterr().out


def test_near_copies_are_found_and_others_are_not():
    rng = random.Random(0)
    pages = [[f"w{rng.randrange(5000)}" for _ in range(300)] for _ in range(60)]
    texts = [" ".join(page) for page in pages]
    changed = pages[7][:150] + ["another"] + pages[7][151:]             # 13 of 288 windows differ
    half = pages[9][:150] + pages[10][:150]                             # a third of the union
    texts += [" ".join(changed), texts[3].upper(), " ".join(half)]
    found = near_copies(texts)
    assert [(i, j) for i, j, _ in found] == [(7, 60), (3, 61)]
    assert found[0][2] == pytest.approx(275 / 301, abs=0.15) and found[1][2] == 1
    assert near_copies(["short", "texts", "short", ""]) == [(0, 2, 1.0)]
    assert near_copies(texts, threshold=0.2)[-1][1] == 62
