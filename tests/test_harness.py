"The adapter to lm-evaluation-harness: its three methods against plain sums; the real harness where it is installed."
import importlib.util
import logging
import math
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.harness import HarnessModel, harness_model, rolling_windows
from nanochat_nb.tokenizer import Tokenizer, tokenizer_json

pytestmark = pytest.mark.usefixtures("one_thread")
installed = importlib.util.find_spec("lm_eval") is not None
with_harness = pytest.mark.skipif(not installed, reason="lm_eval is not installed")

# bytes, and a few tokens that cross what one might cut
TOKENIZER = Tokenizer(tokenizer_json([bytes([b]) for b in range(256)] + [b" n", b" no", b"ab"]))
BOS, NO, AB = TOKENIZER.bos, 257, 258


@dataclass
class Instance:
    "The fields of lm_eval.api.instance.Instance (0.4.13) that a model may read."
    request_type: str
    doc: dict
    arguments: tuple
    idx: int = 0
    metadata: tuple = (None, None, None)
    resps: list = field(default_factory=list)
    filtered_resps: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


def ask(kind, *arguments):
    return [Instance(kind, {}, a) for a in arguments]


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(sequence_len=48, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4, generator=generator)
        model.lm_head.weight[128:256] = model.lm_head.weight[259:] = 0      # it writes ASCII, and does not end
    return model


@pytest.fixture(scope="module")
def adapter(model):
    return HarnessModel(model, TOKENIZER, max_batch=3)


@torch.inference_mode()
def log_probabilities(model, row):
    "Of each token of a row after the first."
    row = torch.tensor([row])
    return model(row[:, :-1])[0].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0], model(row[:, :-1])[0].argmax(-1)


def test_loglikelihood_token_by_token(model, adapter):
    "Requests and the rows they must become, written out; the last tokens of a row are scored."
    expected = {
        ("Go:", " no"): ([BOS, 71, 111, 58, NO], 1),
        ("Go: ", "no"): ([BOS, 71, 111, 58, NO], 1),                    # the space belongs to the answer's token
        ("Go:", " yes"): ([BOS, 71, 111, 58, 32, 121, 101, 115], 4),
        ("", "no"): ([BOS, 110, 111], 2),
        ("xa", "b"): ([BOS, 120, AB], 1),                              # one token holds the end and the answer
        ("aé", "b"): ([BOS, 97, 195, 169, 98], 1),
        ("z" * 60, "no"): ([BOS, *[122] * 46, 110, 111], 2),            # cut: 48 are fed
    }
    results = adapter.loglikelihood(ask("loglikelihood", *expected))
    for (nats, greedy), (row, n) in zip(results, expected.values()):
        p, best = log_probabilities(model, row)
        assert nats == pytest.approx(p[-n:].sum().item(), abs=1e-4)
        assert greedy == (best[-n:] == torch.tensor(row[-n:])).all()
    assert adapter.loglikelihood([]) == [] and adapter.loglikelihood(ask("loglikelihood", ("a", ""))) == [(0.0, True)]


def test_loglikelihood_keeps_the_order(model, adapter):
    "Mixed contexts, repeated requests, empty contexts: the same numbers as one request at a time."
    pairs = [("Go:", " no"), ("", "a"), ("Stop.", " no"), ("Go:", " yes"), ("Go:", " no"), ("", "bcd"), ("q" * 30, "r" * 30)] * 2
    together = adapter.loglikelihood(ask("loglikelihood", *pairs))
    for pair, (nats, greedy) in zip(pairs, together):
        (alone, alone_greedy), = HarnessModel(model, TOKENIZER).loglikelihood(ask("loglikelihood", pair))
        assert nats == pytest.approx(alone, abs=1e-4) and greedy == alone_greedy
    assert [type(x) for x in together[0]] == [float, bool]


def test_greedy_is_what_the_engine_writes(adapter):
    prompt = "Once"
    (text,) = adapter.generate_until(ask("generate_until", (prompt, {"max_gen_toks": 1})))
    if text and "�" not in text:
        assert adapter.loglikelihood(ask("loglikelihood", (prompt, text)))[0][1]
    others = [c for c in "abcxyz" if c != text]
    assert not any(greedy for _, greedy in adapter.loglikelihood(ask("loglikelihood", *((prompt, c) for c in others))))


def harness_windows(ids, prefix, T):
    "The windows that the harness's documentation describes, by its words: (fed, predicted)."
    out, done = [], 0
    while done < len(ids):
        end = min(done + T, len(ids))
        fed = ([prefix, *ids])[:end] if done == 0 else ids[end - T - 1:end - 1]
        out.append((fed, ids[done:end]))
        done = end
    return out


@given(n=st.integers(0, 60), T=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_rolling_windows(n, T):
    ids = list(range(100, 100 + n))
    windows = rolling_windows(ids, 7, T)
    pairs = [(w.rows[0][:-1], w.rows[0][w.starts[0]:]) for w in windows]
    assert pairs == harness_windows(ids, 7, T)
    assert [i for _, predicted in pairs for i in predicted] == ids
    assert all(len(fed) <= T for fed, _ in pairs) and all(len(fed) == T for fed, _ in pairs[1:])


def test_rolling(model, adapter):
    texts = ["no", "", "Go: no. " * 20, "no", "é" * 40]
    expected = []
    for text in texts:
        total = 0.0
        for fed, predicted in harness_windows(TOKENIZER.encode(text), BOS, 48):
            p, _ = log_probabilities(model, [*fed, predicted[-1]])
            total += p[-len(predicted):].sum().item()
        expected.append(total)
    got = adapter.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts)))
    assert got == pytest.approx(expected, abs=1e-3)


def test_generate_until(adapter):
    "Text up to the first stop string, wherever that lies in it: in a token, or over several."
    def write(**settings):
        return adapter.generate_until(ask("generate_until", ("Go:", {"max_gen_toks": 24, **settings})))[0]

    text = write()
    tokens = adapter.engine.generate([[BOS, *TOKENIZER.encode("Go:")]], 24, temperature=0, stop_ids=sorted(TOKENIZER.special_ids))
    assert text == TOKENIZER.decode(tokens[0].tokens) and len(text) >= 12 and text.isascii()
    for start in range(0, len(text) - 3, 2):
        for length in (1, 2, 3):
            stop = text[start:start + length]
            assert write(until=[stop]) == write(until=stop) == text[:text.find(stop)]
            assert write(until=["never", stop, text[5]]) == text[:min(text.find(stop), 5, text.find(text[5]))]
    assert write(until=[]) == write(until=None) == write(until=[""]) == write(until=["never"]) == text
    assert write(max_gen_toks=4) == write(max_gen_toks=None, max_new_tokens=4) == TOKENIZER.decode(tokens[0].tokens[:4])


def test_sampling_settings(adapter):
    def write(**settings):
        return adapter.generate_until(ask("generate_until", *[("Go:", {"max_gen_toks": 12, **settings})] * 3))
    greedy = write()
    assert len(set(greedy)) == 1 and write(do_sample=False, temperature=0.8) == greedy and write(temperature=0) == greedy
    drawn = write(do_sample=True, temperature=1.5)
    assert len(set(drawn)) > 1 and write(do_sample=True, temperature=1.5) == drawn      # other samples, the same again
    assert write(temperature=1.5) == drawn and write(do_sample=True, top_k=1) == greedy


def test_the_package_does_not_import_the_harness():
    code = "import sys, nanochat_nb.harness; assert not [m for m in sys.modules if m.split('.')[0] in ('lm_eval', 'sklearn')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.skipif(installed, reason="lm_eval is installed")
def test_a_missing_harness_is_named(model):
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness_model(model, TOKENIZER)


def test_a_harness_that_cannot_start(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm_eval"):
        harness_model(model, TOKENIZER)


@with_harness
def test_the_real_harness(model):
    "A multiple choice, a rolling and a generating task, all in memory: its metrics are those of the adapter's numbers."
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    lm = harness_model(model, TOKENIZER)
    assert isinstance(lm, LM) and isinstance(lm, HarnessModel) and lm.rank == 0 and lm.world_size == 1
    choices = ["no", "yes indeed", "é"]
    docs = [{"q": f"{'a' * i} no. Well?", "gold": i % 3, "text": "Go: no. " * (i + 1)} for i in range(9)]

    def task(name, **config):
        return ConfigurableTask(config={"task": name, "test_split": "test", "num_fewshot": 0, "doc_to_text": "{{q}}",
                                        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)}, **config})
    logging.disable(logging.WARNING)
    try:
        result = simple_evaluate(lm, tasks=[
            task("pick", output_type="multiple_choice", doc_to_choice=choices, doc_to_target="gold", metric_list=[
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm", "acc_bytes")]),
            task("read", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
                 metric_list=[{"metric": "bits_per_byte"}]),
            task("write", output_type="generate_until", doc_to_target="{{gold}}", generation_kwargs={"until": ["n"], "max_gen_toks": 5},
                 metric_list=[{"metric": "exact_match"}]),
        ], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    finally:
        logging.disable(logging.NOTSET)
    lls = [[nats for nats, _ in lm.loglikelihood(ask("loglikelihood", *((d["q"], " " + c) for c in choices)))] for d in docs]
    for metric, lengths in (("acc", [1] * 3), ("acc_norm", [2, 10, 1]), ("acc_bytes", [2, 10, 2])):
        expected = [max(range(3), key=lambda i: row[i] / lengths[i]) == d["gold"] for row, d in zip(lls, docs)]
        assert result["results"]["pick"][f"{metric},none"] == pytest.approx(sum(expected) / 9)
    nats = sum(lm.loglikelihood_rolling(ask("loglikelihood_rolling", *((d["text"],) for d in docs))))
    num_bytes = sum(len(d["text"].encode()) for d in docs)
    assert result["results"]["read"]["bits_per_byte,none"] == pytest.approx(-nats / num_bytes / math.log(2))
    assert [len(s["resps"]) for s in result["samples"]["write"]] == [1] * 9
