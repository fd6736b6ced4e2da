"Batches: every token once, one order for any number of ranks, exact resume, a decent thread."
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.dataloader import (
    ConversationLoader, PackedLoader, RowLoader, pack, pack_pieces, shuffled, split_document,
    validation_batches, write_rows)
from nanochat_nb.dataset import Documents
from nanochat_nb.tokenizer import Tokenizer

quick = settings(max_examples=50, deadline=None)


class Ids:
    "A tokenizer for documents that are lists of ids already; bos is 0."
    bos = 0

    @staticmethod
    def encode_arrays(texts):
        return texts


def numbered(lengths):
    "Documents of these lengths in which no id occurs twice."
    ids = iter(range(1, 10**9))
    return [[next(ids) for _ in range(n)] for n in lengths]


def take(loader, n):
    return [next(loader) for _ in range(n)]


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others) for a, b in zip(*pair))


def joined(ranks):
    "Batches of several ranks, put together as one rank would see them."
    return [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)]


def row_tokens(inputs, targets):
    "The tokens of a row, inputs and targets checked against each other; padding comes last."
    n = int((targets >= 0).sum())
    assert (targets[n:] == -1).all()
    tokens = [int(inputs[0]), *targets[:n].tolist()]
    assert inputs[:n].tolist() == tokens[:-1]
    return tokens


def pieces_of_row(tokens):
    "Runs between two bos."
    pieces = []
    for token in tokens:
        if token == Ids.bos:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


# --- packing ---------------------------------------------------------------------------------

def best_fit_naive(lengths, capacity):
    "Best fit in decreasing order, without any search structure: the rooms left, sorted."
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - n)
    return sorted(rooms)


@quick
@given(st.lists(st.integers(1, 50)), st.integers(50, 80))
def test_pack_is_best_fit_and_keeps_every_item_once(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) \
        == best_fit_naive(lengths, capacity)


def test_pack_refuses_what_does_not_fit():
    assert pack([], 4) == []
    for lengths in ([5], [0], [1, 9]):
        with pytest.raises(ValueError, match="do not lie in"):
            pack(lengths, 4)


@quick
@given(st.lists(st.integers(1, 99), max_size=100), st.integers(1, 20))
def test_split_document_loses_nothing(ids, T):
    pieces = [piece.tolist() for piece in split_document(ids, 0, T)]
    assert all(piece[0] == 0 and 2 <= len(piece) <= T + 1 for piece in pieces)
    assert all(len(piece) == T + 1 for piece in pieces[:-1])
    assert [i for piece in pieces for i in piece[1:]] == ids


@quick
@given(st.lists(st.integers(1, 150), min_size=1, max_size=60), st.sampled_from([2, 9, 65, 100]))
def test_pack_pieces_keeps_every_token_and_fills_rows(lengths, capacity):
    documents = numbered(lengths)
    ends = {ids[-1] for ids in documents}
    pieces = [piece for ids in documents for piece in split_document(ids, 0, capacity - 1)]
    rows = pack_pieces(pieces, capacity, 0, 1, 2)
    assert sorted(int(t) for row in rows for piece in row for t in piece[1:]) == sum(documents, [])
    room = [capacity - sum(map(len, row)) for row in rows]
    assert min(room) >= 0 and sum(r >= max(2, capacity // 32) for r in room) <= 1
    for row, left in zip(rows, room):
        assert all(piece[0] == 0 and len(piece) > 1 for piece in row)
        for piece in row:  # a bos, or padding, follows only where a document ends
            assert int(piece[-1]) in ends or (piece is row[-1] and left == 0)
    again = pack_pieces(pieces, capacity, 0, 1, 2)
    assert [np.concatenate(row).tolist() for row in rows] == [
        np.concatenate(row).tolist() for row in again]


def test_shuffled_is_the_same_for_ever():
    assert shuffled(8, 42, 0) == [3, 5, 6, 2, 7, 4, 1, 0]     # resuming an older run depends on it
    assert shuffled(0, 1) == [] and shuffled(5, 1) != shuffled(5, 2)


def test_keys_of_other_length_are_other_keys():
    keys = [(1,), (1, 0), (1, 0, 0), (1, 2), (1, 2, 0), (1, 2, 0, 0), (1, 2, 0, 0, 0)]
    assert len({tuple(shuffled(20, *key)) for key in keys}) == len(keys)


def test_any_whole_piece_may_end_a_refilled_row():
    pieces = [piece for ids in numbered([8, 3, 1]) for piece in split_document(ids, 0, 63)]
    rows = [pack_pieces(pieces, 64, 0, key) for key in range(40)]
    assert {len(row[-1]) for (row,) in rows} == {9, 4, 2}


def test_write_rows_masks():
    inputs, targets = write_rows([[([9, 1, 2], True), ([9, 3], [0, 1])], []], 6, 9)
    assert inputs.tolist() == [[9, 1, 2, 9, 3, 9], [9] * 6]
    assert targets.tolist() == [[1, 2, -1, 3, -1, -1], [-1] * 6]


# --- the loader, on any documents ------------------------------------------------------------

lengths_of_documents = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 200)), min_size=1,
                                max_size=40).filter(any)


@quick
@given(lengths_of_documents, st.integers(2, 70), st.integers(1, 50), st.integers(0, 9))
def test_an_epoch_holds_every_token_once(lengths, T, window, seed):
    documents = numbered(lengths)
    owner = {id: i for i, ids in enumerate(documents) for id in ids}
    loader = PackedLoader(documents, Ids, 1, T, window=window, seed=seed)
    seen, loosely_filled, slack = Counter(), 0, max(2, (T + 1) // 32)
    while not seen or loader.epoch == 0:
        if loader._seek(loader.epoch, loader.window, loader.row)[0]:
            break
        inputs, targets = next(loader)
        tokens = row_tokens(inputs[0], targets[0])
        assert tokens[0] == Ids.bos
        loosely_filled += T + 1 - len(tokens) >= slack
        for piece in pieces_of_row(tokens):
            assert piece == list(range(piece[0], piece[-1] + 1))       # in order, without a gap
            assert owner[piece[0]] == owner[piece[-1]]                 # of one document
            seen.update(piece)
    assert seen == Counter(list(owner))
    assert loosely_filled <= loader.num_windows                        # at most one row in a window


@quick
@given(lengths_of_documents, st.integers(2, 40), st.integers(1, 3), st.integers(2, 4),
       st.integers(1, 20))
def test_ranks_see_what_one_rank_would(lengths, T, B, world_size, window):
    documents = numbered(lengths)
    whole = take(PackedLoader(documents, Ids, B * world_size, T, window=window), 6)
    ranks = [take(PackedLoader(documents, Ids, B, T, rank, world_size, window=window), 6)
             for rank in range(world_size)]
    assert same(joined(ranks), whole)


@quick
@given(lengths_of_documents, st.integers(2, 40), st.integers(1, 20), st.integers(0, 12))
def test_two_ranks_stop_and_three_go_on(lengths, T, window, steps):
    documents = numbered(lengths)
    whole = take(PackedLoader(documents, Ids, 6, T, window=window), steps + 3)
    two = [PackedLoader(documents, Ids, 3, T, rank, 2, window=window) for rank in range(2)]
    for loader in two:
        take(loader, steps)
    states = [json.dumps(loader.state_dict()) for loader in two]
    assert states[0] == states[1]
    assert set(json.loads(states[0])) == {"epoch", "window", "row", "num_windows"}
    three = [take(PackedLoader(documents, Ids, 2, T, rank, 3, window=window,
                               state=json.loads(states[0])), 3) for rank in range(3)]
    assert same(joined(three), whole[steps:])


# --- the loader, on text ---------------------------------------------------------------------

WORDS = [a + b for a in ("ka", "lo", "mi", "tre") for b in ("na", "sto", "rel", "dor", "ly", "ing")]


def story(i):
    "A document of 5 to 405 words, the same for the same number."
    return " ".join(WORDS[(i * k * k + k) % len(WORDS)] for k in range(5 + (i * 37) % 401))


STORIES = [story(i) for i in range(60)]
TOKENIZER = Tokenizer.train(STORIES, 300)


def make(B, T=32, window=16, **kwargs):
    return PackedLoader(STORIES, TOKENIZER, B, T, window=window, **kwargs)


def test_rows_spell_the_text():
    loader, pieces = make(1, T=4096), []
    while loader.epoch == 0 and loader._seek(loader.epoch, loader.window, loader.row)[0] == 0:
        inputs, targets = next(loader)
        assert inputs.shape == targets.shape == (1, 4096)
        assert inputs.dtype == targets.dtype == torch.int64
        text = TOKENIZER.decode(row_tokens(inputs[0], targets[0]))
        pieces += text.split("<|bos|>")[1:]
    whole = [piece for piece in pieces if piece in STORIES]
    assert len(whole) > 50 and sorted(whole) == sorted(set(whole))     # a few are cut by refilling
    assert sum(map(len, pieces)) == sum(map(len, STORIES))


def test_resume_is_exact_at_every_position():
    loader, states, batches = make(8), [], []
    while loader.epoch < 2:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(next(loader))
    batches += take(loader, 2)
    edges = [i for i in range(1, len(states)) if states[i]["epoch"] != states[i - 1]["epoch"]]
    assert edges and len(states) > 40
    for i, state in enumerate(states):
        if i % 3 == 0 or min(abs(i - edge) for edge in edges) < 3:
            assert same(take(make(8, state=state), 2), batches[i:i + 2])


def test_a_state_belongs_to_its_place_not_to_its_reader():
    loader = make(4)
    take(loader, 3)
    state = loader.state_dict()
    expected = take(loader, 2)
    assert state == {**state}                                          # not changed by reading on
    assert same(take(make(4, state=state), 2), expected)
    older = {name: state[name] for name in ("epoch", "window", "row")}
    assert same(take(make(4, state=older), 2), expected)               # saved before num_windows
    beyond = make(2, state={"epoch": 5, "window": 3, "row": 9999})     # of a last window with more
    assert next(beyond)[0].shape == (2, 32) and beyond.epoch == 6


@pytest.mark.parametrize("wrong", [
    {}, {"epoch": 0, "window": 0}, {"epoch": 0, "window": 0, "row": -1},
    {"epoch": -1, "window": 0, "row": 0}, {"epoch": 0, "window": 0.5, "row": 0},
    {"epoch": 0, "window": "0", "row": 0}])
def test_a_damaged_state_is_refused(wrong):
    with pytest.raises(UserError, match="whole numbers from 0 on as epoch, window and row"):
        make(4, state=wrong)


@pytest.mark.parametrize("others", [
    {"epoch": 1, "window": 1, "row": 2, "num_windows": 5}, {"epoch": 1, "window": 4, "row": 2}])
def test_a_state_of_other_documents_is_refused(others):
    with pytest.raises(UserError, match="does not belong to these documents, which make 4 windows"):
        make(4, state=others)
    with pytest.raises(UserError, match="does not belong"):
        chats(4, state={"epoch": 0, "window": 0, "row": 0, "num_windows": 99})


def test_batches_are_never_written_again():
    loader = make(4)
    kept, copies = [], []
    while loader.epoch < 2:
        kept.append(next(loader))
        copies.append(tuple(part.clone() for part in kept[-1]))
    assert same(kept, copies)
    memory = {part.untyped_storage().data_ptr() for batch in kept for part in batch}
    assert len(memory) == 2 * len(kept)
    kept[-1][0].zero_()                                                # to be written into
    assert not same(kept[-1:], copies[-1:])


def test_each_epoch_has_an_order_of_its_own():
    def windows(epoch):     # which window of documents comes when
        loader = PackedLoader(numbered([5] * 40), Ids, 1, 8, window=5)
        return [int(loader.rows(epoch, w)[1].max() - 1) // 25 for w in range(loader.num_windows)]
    orders = [windows(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(8)) != order for order in orders)
    assert orders[0] != orders[1] != orders[2]
    alone = make(1, window=1024)                                       # its rows change places
    rows = [list(map(tuple, alone.rows(epoch, 0)[0].tolist())) for epoch in (0, 1)]
    assert rows[0] != rows[1] and len(set(rows[0]) & set(rows[1])) > len(rows[0]) / 3


def test_seeds_differ():
    assert not same(take(make(4), 1), take(make(4, seed=1), 1))


def test_a_window_gets_smaller_for_longer_documents():
    class Long(str):
        def __len__(self):
            return 500_000                                             # a book

    def size(documents, **kwargs):
        return PackedLoader(documents, TOKENIZER, 1, 8, **kwargs).size
    assert size(["short"] * 5000) == size(["short"]) == size([""] * 2000) == 1024
    assert size([Long()] * 3000) == size([Long()] * 40) == 32
    assert size([Long("x" * 8)] * 3 + ["short"] * 2000) == 1024
    assert size(["short"] * 1024 + [Long()] * 500) == 1024             # looks no further
    assert size([Long()] * 3000, window=1024) == 1024
    long = ["x" * 2_000_000] * 20
    assert size(long) == 16 and PackedLoader(long, TOKENIZER, 1, 8).num_windows == 2


def test_choosing_a_window_reads_the_beginning_only():
    class Read(list):
        last = -1

        def __iter__(self):
            for self.last, text in enumerate(super().__iter__()):
                yield text
    documents = Read(STORIES * 100)
    PackedLoader(documents, TOKENIZER, 1, 8)
    assert documents.last <= 1024


def test_cuda_is_the_device_of_the_thread_that_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert make(4, device="cuda").device == torch.device("cuda", 3)
    assert make(4, device="cuda:1").device == torch.device("cuda", 1)


PROCESS = """
import hashlib, json, sys
from test_dataloader import make
rank, world_size, B, steps, state = json.loads(sys.argv[1])
loader = make(B, rank=rank, world_size=world_size, state=state)
rows = [[hashlib.sha256(row.numpy().tobytes()).hexdigest() for part in next(loader) for row in part]
        for _ in range(steps)]
print(json.dumps([rows, loader.state_dict()]))
"""


def in_processes(world_size, B, steps, state):
    "Hashes of the rows that real ranks see, with different hash seeds, and their states."
    running = [subprocess.Popen(
        [sys.executable, "-c", PROCESS, json.dumps([rank, world_size, B, steps, state])],
        stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONHASHSEED": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(world_size)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert all(process.returncode == 0 for process in running)
    return [rows for rows, _ in results], [state for _, state in results]


def test_real_processes_two_then_three():
    whole = [[hashlib.sha256(row.numpy().tobytes()).hexdigest() for part in batch for row in part]
             for batch in take(make(6), 12)]

    def together(ranks, B):  # inputs of all ranks, then targets of all ranks
        parts = slice(0, B), slice(B, 2 * B)
        return [[h for part in parts for rank in ranks for h in rank[step][part]]
                for step in range(len(ranks[0]))]
    first, states = in_processes(2, 3, 8, None)
    assert states[0] == states[1]
    second, _ = in_processes(3, 2, 4, states[0])
    assert together(first, 3) + together(second, 2) == whole


# --- unusual data ----------------------------------------------------------------------------

def test_small_and_empty_data():
    inputs, _ = next(PackedLoader(["tiny"], TOKENIZER, 8, 16))
    assert inputs.shape == (8, 16) and len(set(map(tuple, inputs.tolist()))) == 1
    few = ["tiny", "", "words"]
    ranks = [take(PackedLoader(few, TOKENIZER, 1, 16, rank, 8), 3) for rank in range(8)]
    assert same(joined(ranks), take(PackedLoader(few, TOKENIZER, 8, 16), 3))
    with pytest.raises(UserError, match="no documents"):
        PackedLoader([], TOKENIZER, 1, 8)
    for documents, window in ((["", ""], 1024), ([""] * 9, 2)):
        with pytest.raises(UserError, match="nothing to learn from"):
            next(PackedLoader(documents, TOKENIZER, 1, 8, window=window))
    sparse = PackedLoader([""] * 20 + ["word"] + [""] * 20, TOKENIZER, 3, 8, window=2)
    assert (next(sparse)[1] >= 0).any(dim=1).all()


@pytest.mark.parametrize("wrong", [{"B": 0}, {"T": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(UserError, match="a loader needs"):
        PackedLoader(STORIES, TOKENIZER, **{"B": 1, "T": 8, **wrong})


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": -2}, {"seed": -1}])
def test_impossible_windows_and_seeds_are_refused(wrong):
    with pytest.raises(UserError, match="a loader needs a seed"):
        PackedLoader(STORIES, TOKENIZER, 1, 8, **wrong)
    with pytest.raises(UserError, match="a loader needs a seed"):
        ConversationLoader(CONVERSATIONS, render, 1, 8, **wrong)


def test_one_enormous_document():
    loader = PackedLoader([list(range(1, 10**6 + 1))], Ids, 64, 512)
    seen = set()
    while loader.epoch == 0 and loader.row + 64 <= len(loader.rows(0, 0)[0]):
        inputs, targets = next(loader)
        assert (inputs[:, 0] == 0).all()
        seen |= set(targets[targets > 0].tolist())
        if len(seen) > 200_000:
            break
    assert len(seen) > 200_000
    _, targets = loader.rows(0, 0)
    assert np.unique(targets[targets > 0]).size == 10**6 == (targets > 0).sum()


def test_a_damaged_shard_ends_the_loader_with_its_name(tmp_path):
    for i in range(3):
        pq.write_table(pa.table({"text": STORIES[i * 20:i * 20 + 20]}),
                       tmp_path / f"shard_{i:05d}.parquet", row_group_size=7)
    documents = Documents(tmp_path)
    (tmp_path / "shard_00001.parquet").write_bytes(b"gone")
    with pytest.raises(UserError, match="shard_00001"):
        take(PackedLoader(documents, TOKENIZER, 4, 16, window=10), 500)


# --- the thread ------------------------------------------------------------------------------

class Unreliable(list):
    "Documents that fail the first time when some place is read."
    def __init__(self, documents, at, error):
        super().__init__(documents)
        self.at, self.error = at, error

    def __getitem__(self, index):
        if self.error and index.start <= self.at < index.stop:
            error, self.error = self.error, None
            raise error
        return super().__getitem__(index)


@pytest.mark.parametrize("at", [0, 20, 40])
@pytest.mark.parametrize("B, window", [(8, 16), (96, 4)])  # a batch in one window, and over several
def test_an_error_reaches_the_caller_and_nothing_is_skipped(at, B, window):
    expected = take(make(B, window=window), 60)
    error = OSError("disk gone")
    loader = PackedLoader(Unreliable(STORIES, at, error), TOKENIZER, B, 32, window=window)
    batches, caught = [], []
    for _ in range(61):
        try:
            batches.append(next(loader))
        except OSError as reached:
            caught.append(reached)
    assert caught == [error] and same(batches, expected)


def workers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("rows")}


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_dropped_loader_leaves_no_thread():
    before, gone = workers(), []
    for _ in range(5):
        loader = make(4)
        next(loader)
        gone.append(weakref.ref(loader))
    batches = validation_batches(STORIES, TOKENIZER, 4, 32)
    next(batches)
    assert len(workers() - before) > 0
    del loader, batches
    assert wait_until(lambda: not (workers() - before)), workers() - before
    assert [ref() for ref in gone] == [None] * 5


def test_an_error_does_not_keep_its_loader():
    class Gone(list):
        def __getitem__(self, index):
            raise OSError("disk gone")

    loader = PackedLoader(Gone(STORIES), TOKENIZER, 4, 32)
    gone, before = weakref.ref(loader), workers()
    gc.disable()  # else it would hide a cycle now and then
    try:
        with pytest.raises(OSError):
            next(loader)
        mine = workers() - before
        assert len(mine) == 1
        del loader
        assert wait_until(lambda: gone() is None and not (workers() & mine))
    finally:
        gc.enable()


def test_the_thread_is_one_window_ahead_and_no_more():
    class Counting(RowLoader):
        made = []

        def rows(self, epoch, window):
            self.made.append((epoch, window))
            return np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32)

    loader = Counting(3, 1, 4)
    assert Counting.made == []                                         # nothing unless asked for
    next(loader)
    assert wait_until(lambda: len(Counting.made) == 2)
    take(loader, 6)                                                    # into epoch 1
    assert wait_until(lambda: len(Counting.made) == 5)
    assert Counting.made == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]   # each once


INTERRUPTED = """
import sys, time
from test_dataloader import STORIES, TOKENIZER, PackedLoader, make, same, take

class Slow(list):
    def __getitem__(self, index):
        print("reading", flush=True)
        time.sleep(1.5)
        return super().__getitem__(index)

loader = PackedLoader(Slow(STORIES), TOKENIZER, 4, 32, window=16)
try:
    next(loader)
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    sys.exit("no interrupt arrived")
assert same(take(loader, 2), take(make(4), 2))
print("same", flush=True)      # and now the interpreter ends while the thread makes a window
"""


def test_interrupt_then_go_on_then_exit():
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=os.path.dirname(__file__))
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)  # the main thread waits for the window by now
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted" in output and "same" in output and errors == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_come_from_pinned_memory():
    loader = make(4, device="cuda")
    batches = take(loader, 200)
    assert all(part.is_pinned() for part in loader._here[1])
    assert all(part.device.type == "cuda" for batch in batches for part in batch)
    assert same([tuple(part.cpu() for part in batch) for batch in batches], take(make(4), 200))


# --- validation ------------------------------------------------------------------------------

@pytest.mark.parametrize("max_tokens", [-1, 0, 1000, 10**9])
def test_validation_is_the_same_set_of_rows(max_tokens):
    def rows(B, world_size):
        batches = [list(validation_batches(STORIES, TOKENIZER, B, 32, max_tokens, r, world_size))
                   for r in range(world_size)]
        assert len({len(b) for b in batches}) == 1  # ranks stay in step
        assert all(part.shape == (B, 32) for b in batches for batch in b for part in batch)
        return sorted((tuple(i), tuple(t)) for rank in batches for inputs, targets in rank
                      for i, t in zip(inputs.tolist(), targets.tolist()) if any(x >= 0 for x in t))
    expected = rows(1, 1)
    assert all(rows(B, W) == expected for B, W in ((8, 1), (5, 2), (3, 4)))
    if max_tokens == 1000:
        assert len(expected) == 32
    if max_tokens == -1:
        tokens = Counter(t for _, targets in expected for t in targets
                         if t not in (-1, TOKENIZER.bos))
        assert tokens == Counter(t for ids in TOKENIZER.encode_arrays(STORIES) for t in ids)


def test_validation_on_little_or_nothing():
    ranks = [list(validation_batches(["one word"], TOKENIZER, 2, 64, -1, r, 3)) for r in range(3)]
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert [int((batches[0][1] >= 0).any(dim=1).sum()) for batches in ranks] == [1, 0, 0]
    with pytest.raises(UserError, match="no documents to validate on"):
        validation_batches([], TOKENIZER, 2, 8)                        # before a batch is asked for
    with pytest.raises(UserError, match="max_tokens=-2 must be at least 0, or -1"):
        validation_batches(STORIES, TOKENIZER, 2, 8, max_tokens=-2)
    with pytest.raises(UserError, match="every document is empty"):
        next(validation_batches(["", ""], TOKENIZER, 2, 8))


# --- conversations ---------------------------------------------------------------------------

def render(conversation):
    n, said = conversation
    return [TOKENIZER.bos] + [n] * (n + said), [0] * (1 + n) + [1] * said


CONVERSATIONS = [(1 + i % 20, i % 9) for i in range(60)]


def chats(B, **kwargs):
    return ConversationLoader(CONVERSATIONS, render, B, 24, bos_pad_id=TOKENIZER.bos, window=25,
                              **kwargs)


def test_conversations():
    loader, learned = chats(4), 0
    assert 20 < loader.rows_per_epoch < 60
    for window in range(loader.num_windows):
        inputs, targets = loader.rows(0, window)
        assert (inputs[:, 0] == TOKENIZER.bos).all()
        assert (inputs[:, 1:][targets[:, :-1] >= 0] == targets[:, :-1][targets[:, :-1] >= 0]).all()
        learned += (targets >= 0).sum()
    assert learned == sum(min(said, 24 - n) for n, said in CONVERSATIONS)  # cut at 25 tokens
    whole = take(loader, 30)
    assert loader.epoch >= 1
    for world_size in (2, 4):
        ranks = [take(chats(4 // world_size, rank=r, world_size=world_size), 30)
                 for r in range(world_size)]
        assert same(joined(ranks), whole)
    resumed = chats(4)
    take(resumed, 11)
    assert same(take(chats(4, state=resumed.state_dict()), 5), whole[11:16])


def test_conversations_of_a_row_are_in_no_order():
    def numbered_render(number):
        return [0, number], [0, 1]
    up, neighbours = 0, 0
    for seed in range(3):
        loader = ConversationLoader(range(1, 2001), numbered_render, 1, 39, seed=seed)
        for targets in loader.rows(0, 0)[1]:
            numbers = targets[targets > 0]
            up += (np.diff(numbers) > 0).sum()
            neighbours += len(numbers) - 1
    assert neighbours > 5000 and 0.4 < up / neighbours < 0.6


def test_asking_for_rows_per_epoch_changes_nothing():
    loader = chats(4)
    take(loader, 9)
    state, here, ahead = loader.state_dict(), loader._here, dict(loader._ahead)
    assert loader.rows_per_epoch == chats(4).rows_per_epoch
    assert (loader.state_dict(), loader._ahead) == (state, ahead) and loader._here is here


def test_rows_per_epoch_is_exact_for_one_window():
    loader = ConversationLoader(CONVERSATIONS, render, 1, 24)
    assert loader.rows_per_epoch == len(loader.rows(0, 0)[0])
    take(loader, loader.rows_per_epoch)
    assert loader.row == loader.rows_per_epoch and loader.epoch == 0
    with pytest.raises(UserError, match="no conversations"):
        ConversationLoader([], render, 1, 24)
    with pytest.raises(UserError, match="nothing to learn from"):
        next(ConversationLoader([(3, 0)], render, 1, 24))


# --- real text -------------------------------------------------------------------------------

def test_real_text(real_data):
    documents = Documents(real_data)[0:600]
    tokenizer = Tokenizer.train(documents[:200], 2000)
    loader = PackedLoader(documents, tokenizer, 1, 512, window=256)
    seen, places, padded = Counter(), 0, 0
    for window in range(loader.num_windows):
        _, targets = loader.rows(0, window)
        seen.update(targets[(targets >= 0) & (targets != tokenizer.bos)].tolist())
        places, padded = places + targets.size, padded + (targets < 0).sum()
    assert seen == Counter(i for ids in tokenizer.encode_arrays(documents) for i in ids)
    assert padded < 0.03 * places
    whole_loader = PackedLoader(documents, tokenizer, 120, 512, window=256)
    whole = []
    while whole_loader.epoch == 0:
        whole.append(next(whole_loader))
    for world_size in (2, 3, 4):
        ranks = [PackedLoader(documents, tokenizer, 120 // world_size, 512, rank, world_size,
                              window=256) for rank in range(world_size)]
        assert same(joined([take(rank, len(whole)) for rank in ranks]), whole)
