"""Which library trains and which encodes our tokenizer fastest, and is it right: `python bench/tokenizer.py --text_dir FOLDER`.

FOLDER holds parquet shards with a column `text`; the last one is validation.  Each measurement is a
process of its own, and the libraries take turns.  Libraries that are not installed are left out:
`pip install tokenizers tiktoken gigatoken bpeasy riptoken kitoken iree-tokenizer tokie` into an
environment of their own beside this package.  With --published FOLDER, which holds r50k_base.tiktoken
and cl100k_base.tiktoken, compression is compared with GPT-2's and GPT-4's vocabularies as well.
"""
import argparse
import base64
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB_SIZE, ROUNDS = 32_768, 3
# as first published for cl100k_base: libraries with cutters made by hand look for very certain strings
GPT4_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+")
ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------ one measurement, in its own process

def texts_of(paths: list[str]) -> list[str]:
    import pyarrow.parquet as pq
    return [text for path in paths for text in pq.read_table(path, columns=["text"]).column("text").to_pylist()]


def train(library: str, paths: list[str], tokenizer_json: str) -> dict:
    "Seconds from texts in memory to a finished vocabulary."
    from nanochat_nb.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
    texts, size = texts_of(paths), VOCAB_SIZE - len(SPECIAL_TOKENS)
    if library == "gigatoken":  # takes bytes; its split pattern is GPT-2's and cannot be changed
        import gigatoken
        data = "\0".join(texts).encode()
        start = time.perf_counter()
        gigatoken.train_bpe(data, size, [], separator=b"\0")
    elif library == "rustbpe":
        import rustbpe
        start = time.perf_counter()
        rustbpe.Tokenizer().train_from_iterator(iter(texts), size, pattern=SPLIT_PATTERN)
    elif library == "tokenizers":
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
        theirs = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
        theirs.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        start = time.perf_counter()
        theirs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet,
                                                              show_progress=False))
    elif library == "bpeasy":
        import bpeasy
        start = time.perf_counter()
        bpeasy.train_bpe(iter(texts), SPLIT_PATTERN, 64, size)
    else:
        start = time.perf_counter()
        Tokenizer.train(texts, VOCAB_SIZE)
    return {"seconds": time.perf_counter() - start}


def encode(library: str, paths: list[str], tokenizer_json: str) -> dict:
    "Megabytes a second over all documents at once, and how many documents differ from `tokenizers`."
    import numpy as np
    from nanochat_nb.tokenizer import SPLIT_PATTERN, Tokenizer
    texts, content = texts_of(paths), Path(tokenizer_json).read_text(encoding="utf-8")
    pattern = GPT4_PATTERN if library.endswith(" †") else SPLIT_PATTERN
    content = content.replace(json.dumps(SPLIT_PATTERN, ensure_ascii=False), json.dumps(pattern, ensure_ascii=False))
    content = json.dumps(json.loads(content) | {"added_tokens": []})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        encode_all, as_lists = ENCODERS[library.removesuffix(" †")](str(path), content, pattern, Tokenizer)
    encode_all(texts[:100])
    start = time.perf_counter()
    result = encode_all(texts)
    seconds = time.perf_counter() - start
    import tokenizers
    reference = [e.ids for e in tokenizers.Tokenizer.from_str(content).encode_batch_fast(texts)]
    wrong = sum(np.array_equal(a, b) is False for a, b in zip(as_lists(result), reference, strict=True))
    return {"mb_per_second": sum(len(t.encode()) for t in texts) / seconds / 1e6, "wrong": wrong, "documents": len(texts)}


def ranks_of(content: str) -> dict[bytes, int]:
    from nanochat_nb.tokenizer import byte_alphabet
    return {bytes(byte_alphabet()[c] for c in token): id
            for token, id in json.loads(content)["model"]["vocab"].items()}


def flat(pair, sizes_are_ends: bool):
    import numpy as np
    ids, ends = (np.frombuffer(part, kind) if isinstance(part, bytes) else part
                 for part, kind in zip(pair, (np.uint32, np.uint64)))
    return np.split(ids, (ends[1:-1] if sizes_are_ends else np.cumsum(ends)[:-1]).astype(np.int64))


def with_tokenizers(path, content, pattern, ours):
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(path)
    return (lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts)]), list


def with_tiktoken(path, content, pattern, ours):
    import tiktoken
    encoding = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks_of(content), special_tokens={})
    return (lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())), list


def with_riptoken(path, content, pattern, ours):
    import riptoken
    return riptoken.CoreBPE(ranks_of(content), {}, pattern).encode_ordinary_batch, list


def with_kitoken(path, content, pattern, ours):
    import kitoken
    return kitoken.Kitoken.from_file(path).encode_all, list


def with_iree(path, content, pattern, ours):
    import iree.tokenizer
    return iree.tokenizer.Tokenizer.from_file(path).encode_batch, list


def with_tokie(path, content, pattern, ours):
    import tokie
    return tokie.Tokenizer.from_json(path).encode_batch_flat, lambda pair: flat(pair, False)


def with_gigatoken(path, content, pattern, ours):
    import gigatoken
    return gigatoken.Tokenizer.from_json(content).encode_batch_list, list


def with_fastokens(path, content, pattern, ours):
    import fastokens
    return fastokens.Tokenizer.from_json_str(content).encode_batch_flat, lambda pair: flat(pair, True)


def with_ours(path, content, pattern, ours):
    from nanochat_nb.tokenizer import SPECIAL_TOKENS
    content = json.loads(content)
    size = len(content["model"]["vocab"])
    content["added_tokens"] = [{"content": name, "id": size + i} for i, name in enumerate(SPECIAL_TOKENS)]
    return ours(json.dumps(content)).encode_arrays, list


TRAINERS = ["tokenizers", "bpeasy", "rustbpe", "gigatoken *", "nanochat_nb"]
ENCODERS = {"tokenizers": with_tokenizers, "tiktoken": with_tiktoken, "riptoken": with_riptoken,
            "kitoken": with_kitoken, "iree-tokenizer": with_iree, "tokie": with_tokie,
            "gigatoken": with_gigatoken, "fastokens": with_fastokens, "nanochat_nb": with_ours}


# ------------------------------------------------------------------ compression

def compression(tokenizer_json: str, validation: list[str], published: Path | None) -> dict:
    "Bytes per token on validation text and on the samples of lesson 1, against published vocabularies."
    import fastokens
    from nanochat_nb.tokenizer import SPLIT_PATTERN, tokenizer_json as as_json
    content = json.loads(Path(tokenizer_json).read_text(encoding="utf-8")) | {"added_tokens": []}
    encoders = {f"ours, {len(content['model']['vocab']):,}": fastokens.Tokenizer.from_json_str(json.dumps(content))}
    cells = json.loads((ROOT / "nbs/01_tokenizer.ipynb").read_text(encoding="utf-8"))["cells"]
    scope = {}
    for start in ("PUBLISHED = ", "samples = {"):
        source = next("".join(cell["source"]) for cell in cells if "".join(cell["source"]).startswith(start))
        exec(re.split(r"\n(?:def|needed)", source)[0], {"SPLIT_PATTERN": SPLIT_PATTERN}, scope)
    for name, (file, _, pattern) in scope["PUBLISHED"].items():
        path = (published or Path()) / f"{file}.tiktoken"
        if published and path.exists():
            tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
            encoders[f"{name}, {len(tokens):,}"] = fastokens.Tokenizer.from_json_str(as_json(tokens, pattern, ()))
    texts = {"validation text": validation, **{kind: [text] for kind, text in scope["samples"].items()}}
    rows = [{"text": kind, **{name: f"{sum(len(t.encode()) for t in some) / sum(len(e.encode(t).ids) for t in some):.2f}"
                              for name, e in encoders.items()}} for kind, some in texts.items()]
    return {"columns": ["text", *encoders], "rows": rows,
            "note": "Bytes per token, more is better; special tokens are not counted, the samples are those of lesson 1."}


# ------------------------------------------------------------------ all of them, in turns

def version(library: str) -> str:
    return importlib.metadata.version(library.rstrip(" *†").replace("nanochat_nb", "nanochat-nb"))


def training_table(runs: dict, texts: list[str]) -> dict:
    seconds = {name: statistics.median(run["seconds"] for run in some) for name, some in runs.items()}
    return {"columns": ["library", "version", "seconds", "ratio"],
            "rows": [{"library": name, "version": version(name), "seconds": f"{value:.1f}",
                      "ratio": f"{value / seconds['rustbpe']:.2f}"}
                     for name, value in sorted(seconds.items(), key=lambda item: -item[1])],
            "note": f"{VOCAB_SIZE:,} tokens from {sum(map(len, texts)):,} characters, texts in memory, {os.cpu_count()} "
                    f"cores, median of {ROUNDS} runs; ratio to `rustbpe`. * GPT-2's split pattern, which cannot be "
                    "changed. `nanochat_nb` is `rustbpe`, the making of the file and the loading of the encoder."}


def encoding_table(runs: dict, texts: list[str]) -> dict:
    rates = {name: None if isinstance(some, str) else statistics.median(run["mb_per_second"] for run in some)
             for name, some in runs.items()}
    return {"columns": ["library", "version", "MB/s", "ratio", "documents with other ids"],
            "rows": [{"library": name, "version": version(name), "MB/s": f"{rate:.1f}" if rate else "–",
                      "ratio": f"{rate / rates['tiktoken']:.1f}" if rate else "–",
                      "documents with other ids": runs[name][0]["wrong"] if rate else runs[name]}
                     for name, rate in sorted(rates.items(), key=lambda item: item[1] or 0)],
            "note": f"{len(texts):,} documents of {sum(len(t.encode()) for t in texts):,} bytes in one call, "
                    f"{os.cpu_count()} cores, median of {ROUNDS} runs; ratio to `tiktoken`. † with GPT-4's pattern "
                    "instead of ours. `nanochat_nb` is `fastokens` and a split into arrays."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_dir", required=True, type=Path)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--jobs", nargs="+", default=["training", "encoding", "compression"], help="others are kept as they were")
    parser.add_argument("--measure", nargs=3, metavar=("JOB", "LIBRARY", "TOKENIZER_JSON"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shards = [str(path) for path in sorted(arguments.text_dir.glob("*.parquet"))]
    if len(shards) < 2:
        sys.exit(f"expected at least two parquet shards in {arguments.text_dir}, found {len(shards)}.")
    if arguments.measure:
        job, library, path = arguments.measure
        measured = train(library.rstrip(" *"), shards[:-1], path) if job == "train" else encode(library, shards[-1:], path)
        print(json.dumps(measured))
        return

    from nanochat_nb.tokenizer import Tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = str(Tokenizer.train(texts_of(shards[:-1]), VOCAB_SIZE).save(folder))

        def turns(job: str, libraries: list[str]) -> dict[str, list[dict] | str]:
            found = {library: [] for library in libraries}
            for _ in range(ROUNDS):
                for library in libraries:
                    if isinstance(found[library], str):
                        continue
                    run = subprocess.run([sys.executable, __file__, "--text_dir", str(arguments.text_dir), "--measure",
                                          job, library, path], capture_output=True, text=True)
                    if run.returncode:
                        error = run.stderr.strip().splitlines()[-1]
                        found[library] = ("not installed" if "ModuleNotFound" in error else
                                          "refuses our pattern" if "pre_tokenizer" in run.stderr else "failed")
                        print(f"{job} {library}: {error[:200]}", file=sys.stderr)
                    else:
                        found[library].append(json.loads(run.stdout.splitlines()[-1]))
            return {library: runs for library, runs in found.items() if runs != "not installed"}

        measured = {
            "training": lambda: training_table(turns("train", TRAINERS), texts_of(shards[:-1])),
            "encoding": lambda: encoding_table(turns("encode", [*ENCODERS, "gigatoken †"]), texts_of(shards[-1:])),
            "compression": lambda: compression(path, texts_of(shards[-1:]), arguments.published)}
        measured = {job: measured[job]() | {"date": time.strftime("%Y-%m-%d")} for job in arguments.jobs}

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    path = Path(__file__).parent / "results" / "tokenizer.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result |= {"what": "engines of the tokenizer; each table is one run in which the libraries took turns",
               "hardware": f"{os.cpu_count()} × {cpu}"} | measured
    result.pop("date", None)
    for job in arguments.jobs:
        columns = result[job]["columns"]
        print(f"\n{job}: {result[job]['note']}")
        for row in [dict(zip(columns, columns)), *result[job]["rows"]]:
            print("  ".join(f"{row[column]!s:>16}" for column in columns))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
