"""How fast the loader is, and what its packing wastes: `python bench/dataloading.py [--data_dir DIR]`.

Text: a data folder (default: the folder that NANOCHAT_TEST_DATA names, else pocket text made here).
The reference is best-fit crop as a plain function: from 1,000 waiting documents take the longest that
fits; when none fits, cut the shortest to fill the row and drop the rest. Loaders take turns, so that a
machine whose speed drifts treats them alike.
"""
import argparse
import bisect
import itertools
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from nanochat_nb.dataloader import PackedLoader, pack_pieces, split_document, write_rows
from nanochat_nb.dataset import Documents
from nanochat_nb.pocket import documents as pocket_documents
from nanochat_nb.tokenizer import Tokenizer

SHAPES = ((256, 16), (2048, 8))           # T, B
VOCAB_SIZE, TRAIN_CHARS = 32768, 30_000_000
WINDOW = 1024
RESULTS = Path(__file__).parent / "results"


def crop_rows(source, capacity, buffer_size=1000, refill=128):
    "Rows of documents (lists of tokens), the last one cut where none fits; for ever."
    source, waiting = iter(source), []
    while True:
        row, room = [], capacity
        while room:
            while len(waiting) < buffer_size:
                waiting += itertools.islice(source, refill)
            best = max((i for i, ids in enumerate(waiting) if len(ids) <= room),
                       key=lambda i: len(waiting[i]), default=None)
            if best is None:
                best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
            row.append(waiting.pop(best)[:room])
            room -= len(row[-1])
        yield row


def crop_lengths(lengths, capacity, num_rows, buffer_size=1000, refill=128):
    "The same on lengths, by bisection, until they run out: rows of (length, places used), and what waits."
    source, waiting, rows = iter(lengths), [], []
    while len(rows) < num_rows:
        row, room = [], capacity
        while room:
            if len(waiting) < buffer_size:
                new = refill * -(-(buffer_size - len(waiting)) // refill)
                waiting = sorted(waiting + list(itertools.islice(source, new)))
                if len(waiting) < buffer_size:
                    return rows, waiting
            at = bisect.bisect_right(waiting, room)
            n = waiting.pop(at - 1 if at else 0)
            row.append((n, min(n, room)))
            room -= min(n, room)
        rows.append(row)
    return rows, waiting


def crop_batches(texts, tokenizer, B, T, seed):
    "Batches of best-fit crop, tokenized 128 documents at a time in the caller's thread."
    def encoded():
        for start in itertools.cycle(range(seed * 4 * WINDOW, len(texts), 128)):
            for ids in tokenizer.encode_batch(texts[start:start + 128]):
                yield [tokenizer.bos, *ids]
    rows = crop_rows(encoded(), T + 1)
    while True:
        tokens = torch.tensor([[i for ids in next(rows) for i in ids] for _ in range(B)])
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def speed(texts, tokenizer, T, B, num_tokens, rounds):
    "Tokens per second of wall time and core-seconds per million tokens, of fresh loaders in turn."
    loaders = {"ours": PackedLoader, "best_fit_crop": crop_batches}
    measured = {name: [] for name in loaders}
    for seed in range(rounds):  # each round reads other documents: no tokenizer knows them yet
        for name, make in loaders.items():
            work, start = time.process_time(), time.perf_counter()
            batches = make(texts, tokenizer, B, T, seed=seed)  # its first window counts, too
            done = sum(next(batches)[0].numel() for _ in range(num_tokens // (B * T)))
            measured[name].append((done / (time.perf_counter() - start),
                                   1e6 * (time.process_time() - work) / done))
            del batches
    result = {name: {"tokens_per_second": round(statistics.median(s for s, _ in pairs)),
                     "core_seconds_per_million_tokens": round(statistics.median(c for _, c in pairs), 2)}
              for name, pairs in measured.items()}
    result["ratio"] = round(statistics.median(a / b for (a, _), (b, _) in zip(*measured.values())), 2)
    return result


def shares(texts, tokenizer, T, rounds):
    "Seconds per million tokens of the steps that make one window, the best of some rounds."
    best = {}
    for _ in range(rounds):
        times = [time.perf_counter()]
        encoded = tokenizer.encode_arrays(texts)
        times.append(time.perf_counter())
        pieces = [piece for ids in encoded for piece in split_document(ids, tokenizer.bos, T)]
        times.append(time.perf_counter())
        rows = pack_pieces(pieces, T + 1, tokenizer.bos, 0)
        times.append(time.perf_counter())
        write_rows([[(piece, True) for piece in row] for row in rows], T, tokenizer.bos)
        times.append(time.perf_counter())
        for name, a, b in zip(("tokenize", "split", "pack", "write"), times, times[1:]):
            best[name] = min(best.get(name, float("inf")), (b - a) * 1e6 / sum(map(len, encoded)))
    total = sum(best.values())
    return {name: {"seconds_per_million_tokens": round(s, 4), "share": round(s / total, 3)} for name, s in best.items()}


def seen_by_crop(lengths, T, num_rows):
    "What best-fit crop loses and shows, and how many waiting documents fit a row at the end."
    rows, waiting = crop_lengths((lengths + 1).tolist(), T + 1, num_rows)
    n, used = np.array([pair for row in rows for pair in row]).T
    early_n, early_used = np.array([pair for row in rows[:500] for pair in row]).T
    drawn = len(n) + len(waiting)
    return {"rows": len(rows), "lost_percent": round(100 * (1 - used.sum() / n.sum()), 2),
            "lost_percent_first_500_rows": round(100 * (1 - early_used.sum() / early_n.sum()), 2),
            "tokens_of_long_documents_percent": round(100 * used[n > T + 1].sum() / used.sum(), 1),
            "long_documents_used_percent": round(100 * (n > T + 1).sum()
                                                 / max(1, (lengths[:drawn] > T).sum()), 1),
            "longest_document_used": int(n.max()) - 1, "documents_drawn": drawn,
            "waiting_that_fit": sum(m <= T + 1 for m in waiting), "waiting": len(waiting)}


def seen_by_us(lengths, T):
    "What our packing pads and shows, for whole windows of these lengths."
    places = kept = headless = pieces_made = 0
    for start in range(0, len(lengths), WINDOW):
        marked = [np.array([1] + [2] * (n - 1), np.int32) for n in lengths[start:start + WINDOW]]  # 1: a beginning
        rows = pack_pieces([piece for ids in marked for piece in split_document(ids, 0, T)], T + 1, 0, start)
        places += len(rows) * (T + 1)
        for row in rows:
            kept += sum(map(len, row))
            pieces_made += len(row)
            headless += sum(len(piece) - 1 for piece in row if piece[1] != 1)
    assert kept - pieces_made == lengths.sum()  # every token, once
    return {"padded_percent": round(100 * (1 - kept / places), 2), "lost_percent": 0.0,
            "headless_tokens_percent": round(100 * headless / lengths.sum(), 1),
            "tokens_of_long_documents_percent": round(100 * lengths[lengths > T].sum() / lengths.sum(), 1),
            "longest_document_used": int(lengths.max())}


def packing(lengths, T, num_rows):
    "The same documents through both."
    crop = seen_by_crop(lengths, T, num_rows)
    drawn = lengths[:crop["documents_drawn"]]
    ours = seen_by_us(drawn[:max(WINDOW, len(drawn) // WINDOW * WINDOW)], T)
    return {"T": T, "documents_longer_than_a_row_percent": round(100 * float((drawn > T).mean()), 1),
            "source_tokens_of_long_documents_percent": round(100 * float(drawn[drawn > T].sum() / drawn.sum()), 1),
            "ours": ours, "best_fit_crop": crop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default=os.environ.get("NANOCHAT_TEST_DATA"))
    parser.add_argument("--num_tokens", type=int, default=4_000_000, help="per loader, shape and round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.data_dir:
        documents = Documents(args.data_dir)
    else:
        documents = list(itertools.islice(pocket_documents(random.Random(0)), 20_480))
    chars = itertools.accumulate(map(len, documents))
    sample = [text for text, end in zip(documents, chars) if end <= TRAIN_CHARS]
    tokenizer = Tokenizer.train(sample, VOCAB_SIZE)
    texts = documents[0:WINDOW]
    machines = json.loads((RESULTS / "training_speed.json").read_text())["machines"]
    consumes = max(row["tokens_per_second"] for machine in machines for row in machine["rows"]
                   if row["depth"] == 4 and "form" in row)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    result = {"what": "loader throughput on all cores, packing waste, document lengths seen; best-fit crop as reference",
              "text": "real" if args.data_dir else "pocket", "vocab_size": tokenizer.vocab_size,
              "hardware": f"{os.cpu_count()} × {cpu}", "torch": torch.__version__.split("+")[0],
              "date": time.strftime("%Y-%m-%d"), "trainer_tokens_per_second": consumes, "shapes": []}
    for T, B in SHAPES:
        row = {"T": T, "B": B, **speed(documents, tokenizer, T, B, args.num_tokens, args.rounds),
               "window_steps": shares(texts, tokenizer, T, args.rounds)}
        row["times_the_trainer"] = round(row["ours"]["tokens_per_second"] / consumes, 1)
        result["shapes"].append(row)
        print(json.dumps(row))
    lengths = np.concatenate([[len(ids) for ids in tokenizer.encode_arrays(documents[i:i + WINDOW])]
                              for i in range(0, len(documents), WINDOW)]).astype(int)
    lengths = lengths[lengths > 0]
    rows = list(itertools.islice(crop_rows(([0] * (n + 1) for n in lengths), 257), 300))
    assert [len(ids) for row in rows for ids in row] == [
        n for row in crop_lengths(lengths + 1, 257, 300)[0] for _, n in row]
    web = np.clip(np.random.default_rng(0).lognormal(6.4, 1.0, 40_000), 2, None).astype(int)
    result["lengths"] = {str(q): int(np.percentile(lengths, q)) for q in (1, 25, 50, 75, 99, 100)}
    average = lengths[:16 * WINDOW].mean()
    result["packing"] = {f"text, T={T}": packing(lengths, T, int(10 * WINDOW * average / T)) for T in (256, 1024, 2048)}
    for rows in (3000, 6000):
        result["packing"][f"lognormal(6.4, 1), {rows} rows"] = packing(web, 2048, rows)
    for name, row in result["packing"].items():
        print(name, json.dumps(row))
    path = RESULTS / "dataloading.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
