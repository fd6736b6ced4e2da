"""Dials against a naive row, draws that no neighbour touches, penalties, stop strings."""
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.sampling import (
    MAX_STOPS,
    Dials,
    StopText,
    next_token_probabilities,
    penalize,
    sample,
    uniform_stream,
)
from nanochat_nb.tokenizer import Tokenizer, Utf8Stream

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-4     # fp32 logits to ±20 at temperatures from 0.1: exponents are right to about this much


# ---------------------------------------------------------------- what a row may draw, by definition

def candidates_naive(row: list[float], dials: Dials) -> tuple[list[tuple[int, float]], set[int]]:
    """(id, probability) of the tokens kept, the likeliest first; and ids too close to a border to say.

    In Python's double precision, over the whole row, one token at a time.
    """
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if dials.temperature == 0:
        return [(order[0], 1.0)], set()
    peak = row[order[0]]

    def weight(logit: float) -> float:
        return 1.0 if logit == peak else math.exp(max(-1e4, (logit - peak) / dials.temperature))

    order = order[:dials.top_k or None]
    total = math.fsum(weight(row[i]) for i in order)
    kept, doubtful, mass = [], set(), 0.0
    for i in order:
        p, least = weight(row[i]) / total, dials.min_p / total
        if kept:                                             # the first is never cut
            if dials.top_p < 1 and abs(mass - dials.top_p) < EPS or 0 < least and abs(p - least) < EPS:
                doubtful.add(i)
            elif dials.top_p < 1 and mass > dials.top_p or p < least:
                break
        kept.append((i, p))
        mass += p
    return kept, doubtful


def as_dict(probabilities, ids) -> dict[int, float]:
    "id → probability of the tokens that can be drawn."
    pairs = list(zip(ids.tolist(), probabilities.tolist(), strict=True))
    assert len({i for i, _ in pairs}) == len(pairs)          # no id twice
    return {i: p for i, p in pairs if p > 0}


# few different values: ties are the rule
LOGIT = st.one_of(st.sampled_from([0.0, -0.0, 1.5, -2.0, 7.0, math.inf, -math.inf]),
                  st.integers(-40, 40).map(lambda n: n / 2), st.integers(-2**21, 2**21).map(lambda n: n / 1e5))
DIALS = st.builds(
    Dials,
    temperature=st.sampled_from([0, 0.0, 1e-320, 1e-30, 0.1, 0.7, 1, 2.0, 1e30, 1e300]) | st.floats(0.1, 4),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1, 1.0, 0.5, 0.9, 1e-12]) | st.floats(1e-3, 1),
    min_p=st.sampled_from([0, 0.0, 1.0, 0.1, 0.5]) | st.floats(0, 1))


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 40), DIALS)
def test_dials_against_the_definition(data, B, V, dials):
    rows = data.draw(st.lists(st.lists(LOGIT, min_size=V, max_size=V), min_size=B, max_size=B))
    assume(all(max(row) > -math.inf for row in rows))
    logits = torch.tensor(rows, dtype=torch.float32)
    before = logits.clone()
    probabilities, ids = next_token_probabilities(logits, dials)
    assert torch.equal(logits, before)
    assert probabilities.shape == ids.shape and probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(-1), torch.ones(B), atol=1e-6)
    for row, p, i in zip(rows, probabilities, ids):
        ours, (expected, doubtful) = as_dict(p, i), candidates_naive(row, dials)
        sure = {token for token, q in expected if q > EPS and token not in doubtful}
        assert sure <= set(ours) <= {token for token, _ in expected} | doubtful
        scale = sum(q for token, q in expected if token in ours)
        for token, q in expected:
            if token in ours:
                assert abs(ours[token] - q / scale) < 2 * EPS


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 30), DIALS)
def test_a_row_is_drawn_in_proportion(data, V, dials):
    "A thousand equally spaced numbers: each token comes as often as it should, to within one."
    row = data.draw(st.lists(LOGIT, min_size=V, max_size=V))
    assume(max(row) > -math.inf)
    logits, n = torch.tensor([row], dtype=torch.float32), 1000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = sample(logits.expand(n, -1), uniforms.float(), dials)
    p = as_dict(*(x[0] for x in next_token_probabilities(logits, dials)))
    counts = drawn.bincount(minlength=V).tolist()
    for token, count in enumerate(counts):
        assert abs(count - n * p.get(token, 0.0)) <= 1.01
        assert count == 0 or token in p


def test_powers_of_two_are_exact():
    "Borders that doubles and singles agree on to the last bit."
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    for dials, kept in [(Dials(top_k=3), {1: 4 / 7, 3: 2 / 7, 0: 1 / 7}), (Dials(top_p=0.75), {1: 2 / 3, 3: 1 / 3}),
                        (Dials(top_p=0.76), {1: 4 / 7, 3: 2 / 7, 0: 1 / 7}), (Dials(top_p=0.5), {1: 1.0}),
                        (Dials(top_p=1e-300), {1: 1.0}), (Dials(min_p=1.0), {1: 1.0}), (Dials(top_k=99), None)]:
        ours = as_dict(*(x[0] for x in next_token_probabilities(logits, dials)))
        assert ours == pytest.approx(kept or {0: 1 / 8, 1: 1 / 2, 2: 1 / 8, 3: 1 / 4}, abs=1e-6)
    equal = torch.zeros(1, 64)
    for dials, n in [(Dials(top_k=5), 5), (Dials(top_p=0.25), 16), (Dials(min_p=1.0), 64), (Dials(top_k=32, top_p=0.25), 8)]:
        ours = as_dict(*(x[0] for x in next_token_probabilities(equal, dials)))
        assert ours == pytest.approx(dict.fromkeys(range(n), 1 / n))
    for V in (64, 5000):
        assert next_token_probabilities(torch.zeros(1, V), Dials(top_k=5))[1].tolist() == [[0, 1, 2, 3, 4]]
    for dials in (Dials(top_k=1), Dials(top_k=2, top_p=0.1), Dials(top_p=0.1), Dials(0)):
        signs = torch.tensor([[-3.0, -0.0, 0.0]])            # equal, so the lower id
        assert sample(signs, torch.tensor([0.5]), dials).tolist() == [1]
    assert sample(equal, torch.tensor([0.99]), Dials(temperature=0)).tolist() == [0]


@pytest.mark.parametrize("levels", [2, 30, 10_000])      # all but equal, many equals, hardly any
@pytest.mark.parametrize("k", [1, 50, 499, 500])
def test_the_k_likeliest_with_equals(levels, k):
    rows = torch.randint(-levels, levels, (8, 500), generator=torch.Generator().manual_seed(levels)) / 7
    _, ids = next_token_probabilities(rows, Dials(top_k=k, top_p=0.999999))
    for row, ours in zip(rows.tolist(), ids.tolist()):
        assert ours == sorted(range(500), key=lambda i: (-row[i], i))[:k]


def test_what_is_certain_and_what_is_forbidden():
    inf, u = math.inf, torch.tensor([0.0, 0.5, 0.999])
    for dials in (Dials(), Dials(0), Dials(1e-30), Dials(1e30), Dials(top_k=2), Dials(top_p=0.3), Dials(min_p=0.5)):
        forbidden = torch.tensor([[-inf, 3.0, -inf, 3.0]]).expand(3, -1)
        assert set(sample(forbidden, u, dials).tolist()) <= {1, 3}
        certain = torch.tensor([[3e38, inf, -3e38, 0.0]]).expand(3, -1)
        assert sample(certain[:, 1:], u, dials).tolist() == [0, 0, 0]
        assert set(sample(certain, u, dials).tolist()) <= {0, 1}     # 3e38 is nearly as good as inf
        only = torch.tensor([[-inf, -inf, -3e38, -inf]]).expand(3, -1)
        assert sample(only, u, dials).tolist() == [2, 2, 2]


def test_numbers_at_the_ends_of_the_interval():
    logits = torch.tensor([[0.0, 1.0, -math.inf]]).expand(4, -1)
    for dials in (Dials(), Dials(top_k=3), Dials(top_p=0.9)):
        ids = sample(logits, torch.tensor([0.0, 1 - 2**-24, 1.0, 0.5]), dials)
        assert set(ids.tolist()) <= {0, 1}       # the number that float32 rounds up to 1 as well


def test_every_token_of_a_large_vocabulary_has_its_place():
    "Fifty thousand equal pieces: the middle of each draws its own token; a sum of floats would drift."
    V = 50_000
    chunk, logits = 500, torch.full((1, V), -3.7)
    for start in range(0, V, 10_000):
        wanted = torch.arange(start, start + chunk)
        uniforms = ((wanted.double() + 0.5) / V).float()
        assert torch.equal(sample(logits.expand(chunk, -1), uniforms, Dials()), wanted)


# ---------------------------------------------------------------- neighbours

ALL_DIALS = [Dials(), Dials(0), Dials(0.8, top_k=50), Dials(top_p=0.9), Dials(1.3, min_p=0.05),
             Dials(0.7, 40, 0.95, 0.02), Dials(1e-30, top_k=7)]


@pytest.mark.parametrize("V", [1, 7, 50, 333, 5000])
@pytest.mark.parametrize("dials", ALL_DIALS, ids=str)
def test_neighbours_do_not_matter(V, dials):
    "Bit for bit, in batches of any size and order; logits as coarse as a bf16 model's, so full of ties."
    g = torch.Generator().manual_seed(V)
    logits = (3 * torch.randn(48, V, generator=g)).bfloat16().float()
    uniforms = torch.rand(48, generator=g)
    probabilities, ids = next_token_probabilities(logits, dials)
    drawn = sample(logits, uniforms, dials)
    for rows in [*torch.arange(48).split(1), *torch.arange(48).split(17), torch.arange(47, -1, -1)]:
        p, i = next_token_probabilities(logits[rows], dials)
        assert torch.equal(p, probabilities[rows]) and torch.equal(i, ids[rows])
        assert torch.equal(sample(logits[rows], uniforms[rows], dials), drawn[rows])
    strided = torch.cat([logits, logits], 1)[:, :V]          # rows that do not lie end to end
    assert torch.equal(sample(strided, uniforms, dials), drawn)


def test_threads_do_not_matter():
    g = torch.Generator().manual_seed(0)
    logits, uniforms = 3 * torch.randn(16, 30_000, generator=g), torch.rand(16, generator=g)
    for dials in ALL_DIALS:
        one = sample(logits, uniforms, dials)
        torch.set_num_threads(2)
        two = sample(logits, uniforms, dials)
        torch.set_num_threads(1)
        assert torch.equal(one, two)


def test_no_rows():
    for dials in ALL_DIALS:
        assert sample(torch.empty(0, 9), torch.empty(0), dials).shape == (0,)


def test_streams_of_numbers():
    long = uniform_stream(5, 2, 1000)
    assert long.dtype == np.float32 and long.shape == (1000,) and 0 <= long.min() < long.max() < 1
    for length in (0, 1, 7, 999):
        assert np.array_equal(uniform_stream(5, 2, length), long[:length])
    others = [uniform_stream(*key, 20) for key in [(5, 3), (2, 5), (6, 1), (6, 2), (-5, 2), (0, 0), (None, 2), (None, 2)]]
    assert len({row.tobytes() for row in [long[:20], *others]}) == 9


# ---------------------------------------------------------------- statistics

def chi_square_p(observed, expected) -> float:
    "Probability of a larger statistic if all is well; cells that expect less than 5 are put together."
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    small = expected < 5
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(chi2 / 2)).item()


@pytest.mark.parametrize("dials", [Dials(), Dials(0.7), Dials(1.4, top_k=20), Dials(top_p=0.8), Dials(min_p=0.1)], ids=str)
def test_frequencies(dials):
    "Two hundred streams of numbers, as requests would use them, against the definition's shares."
    n, V = 200, 60
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    uniforms = torch.from_numpy(np.stack([uniform_stream(11, i, 250) for i in range(n)]))
    observed = sum(sample(logits.expand(n, -1), u, dials).bincount(minlength=V) for u in uniforms.T)
    expected, _ = candidates_naive(logits[0].tolist(), dials)
    shares = np.zeros(V)
    shares[[i for i, _ in expected]] = [p for _, p in expected]
    shares /= shares.sum()
    assert observed[shares == 0].sum() == 0
    kept = shares > 0
    assert chi_square_p(observed.numpy()[kept], shares[kept] * n * 250) > 1e-3
    if kept.sum() > 2:                                       # and the test would notice a wrong dial
        wrong = np.where(kept, shares ** 0.9, 0)
        assert chi_square_p(observed.numpy()[kept], wrong[kept] / wrong.sum() * n * 250) < 1e-3


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, values", {
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, [1.0], 1j, torch.tensor(1.0)],
    "top_k": [-1, 2.5, 3.0, math.nan, "5", None, False, np.float32(2)],
    "top_p": [0, 0.0, -0.1, 1.01, math.nan, math.inf, "0.9", None, True],
    "min_p": [-0.1, 1.01, math.nan, "0", None, False],
    "repetition_penalty": [0, -1.2, math.nan, math.inf, "1.1", None, True],
}.items())
def test_dials_refuse(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be .*; got "):
            Dials(**{name: value})


def test_dials_take_any_kind_of_number_and_are_equal_by_value():
    ours = Dials(temperature=np.float64(0.5), top_k=np.int64(5), top_p=1, min_p=np.float32(0.5))
    assert ours == Dials(0.5, 5, 1.0, 0.5) and hash(ours) == hash(Dials(0.5, 5, 1.0, 0.5))
    logits, uniforms = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 0.99, 9)
    assert torch.equal(sample(logits, uniforms, ours), sample(logits, uniforms, Dials(0.5, 5, 1.0, 0.5)))
    with pytest.raises(AttributeError):
        ours.top_k = 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_other_dtypes_are_refused(dtype):
    for dials in (Dials(), Dials(0), Dials(top_k=2)):
        with pytest.raises(UserError, match="float32"):
            sample(torch.zeros(2, 5, dtype=dtype), torch.rand(2), dials)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_rows_without_a_possible_token_are_refused(nan):
    bad = torch.zeros(4, 5)
    bad[1] = -math.inf
    bad[3, 2] = torch.tensor(nan)
    for dials in (Dials(), Dials(0), Dials(top_k=2), Dials(top_p=0.5), Dials(min_p=0.5)):
        with pytest.raises(UserError, match=r"\[1, 3\]"):
            sample(bad, torch.rand(4), dials)
    with pytest.raises(UserError, match="one number for each of the 4 rows"):
        sample(torch.zeros(4, 5), torch.rand(1), Dials())
    with pytest.raises(UserError, match=r"\(B, V\)"):
        next_token_probabilities(torch.zeros(5), Dials())


# ---------------------------------------------------------------- repetition penalty

@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.integers(0, 9),
       st.sampled_from([1.0, 1.2, 2.0, 0.5]) | st.floats(0.25, 5, width=32))
def test_penalty_against_a_loop(data, B, V, S, penalty):
    lists = lambda values, size: st.lists(values, min_size=size, max_size=size)
    rows = data.draw(lists(lists(LOGIT, V), B))
    seen = data.draw(lists(lists(st.integers(0, V - 1), S), B))
    lengths = data.draw(lists(st.integers(0, S), B))
    padded = [ids[:n] + [-7] * (S - n) for ids, n in zip(seen, lengths)]        # padding may be anything
    logits = torch.tensor(rows, dtype=torch.float32)
    before = logits.clone()
    ours = penalize(logits, torch.tensor(padded).view(B, S).long(), torch.tensor(lengths), penalty)
    assert torch.equal(logits, before) and ours.shape == (B, V)
    expected = logits.clone()
    for b in range(B):
        for token in set(seen[b][:lengths[b]]):
            x = expected[b, token]
            expected[b, token] = x / penalty if x > 0 else x * penalty
    assert torch.equal(ours, expected)
    if penalty == 1:
        assert torch.equal(ours, logits)


def test_penalised_rows_can_be_drawn():
    logits = torch.tensor([[5.0, 4.9, -1.0]]).expand(3, -1)
    lowered = penalize(logits, torch.tensor([[0, 0], [0, 1], [2, 2]]), torch.tensor([2, 2, 0]), 1.5)
    assert sample(lowered, torch.zeros(3), Dials(0)).tolist() == [1, 0, 0]
    for dials in ALL_DIALS:
        assert sample(lowered, torch.rand(3), dials).shape == (3,)


# ---------------------------------------------------------------- stop strings

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log; aab aaab 🦊🦊 né"] * 4, 300)


class Pieces:
    "A tokenizer whose token i is `chunks[i]`: text cut into tokens in any way at all."

    special_ids = frozenset({-1})

    def __init__(self, chunks: list[bytes]):
        self.chunks = chunks

    def _show(self, id: int) -> bytes:
        return b"<|bos|>" if id == -1 else self.chunks[id]


def until_stop(text: str, stop: list[str]) -> str:
    return text[:min([i for i in map(text.find, stop) if i >= 0], default=len(text))]


def read(chunks: list[bytes], stop) -> tuple[str, bool]:
    "All text shown; after every token it must be as much as can be known."
    reader, shown = StopText(Pieces(chunks), stop), ""
    for n in range(len(chunks)):
        was = shown
        shown += reader.push(n)
        if reader.stopped:
            assert all(reader.push(i) == "" for i in (n, -1)) and reader.flush() == ""
            return shown, True
        assert reader.push(-1) == ""                          # a special token is not text
        arrived = Utf8Stream(Pieces(chunks))
        text = "".join(arrived.push(i) for i in range(n + 1))
        assert text.startswith(shown) and shown.startswith(was)
        held = text[len(shown):]                              # only what could become a stop string
        assert not held or any(s.startswith(held) and s != held for s in stop)
    return shown + reader.flush(), reader.stopped


ALPHABET = "aab🦊é<"
TEXT = st.text(st.sampled_from(ALPHABET), max_size=14)
STOPS = st.lists(st.text(st.sampled_from(ALPHABET), min_size=1, max_size=5), max_size=4)


@settings(max_examples=600, deadline=None)
@given(TEXT, STOPS, st.sets(st.integers(0, 60)))
@example("aaab", ["aab"], {1, 2, 3})
@example("aaab", ["aab"], set())
@example("abcd", ["bc", "abcd"], {1, 2, 3})
@example("abcx", ["bc", "abcd"], {1, 2, 3})
@example("abc", ["bc", "abcd"], {1, 2, 3})
@example("xabab", ["ab", "abab"], {2, 4})
@example("a🦊é🦊", ["🦊é🦊"], {2, 3, 6, 8, 10})
def test_text_ends_where_the_first_stop_string_begins(text, stop, cuts):
    whole = text.encode()
    borders = sorted({0, len(whole)} | {c for c in cuts if c < len(whole)})
    chunks = [whole[a:b] for a, b in zip(borders, borders[1:])]
    shown, stopped = read(chunks, stop)
    assert shown == until_stop(text, stop)
    assert stopped == any(s in text for s in stop)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=4), max_size=8), st.lists(st.sampled_from(["a", "�", "\x00b", "aé"]), max_size=3))
def test_bytes_that_are_no_text(chunks, stop):
    text = b"".join(chunks).decode(errors="replace")
    shown, stopped = read(chunks, stop)
    assert shown == until_stop(text, stop) and stopped == any(s in text for s in stop)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("the catsonmd;aab🦊né "), max_size=40), data=st.data())
def test_with_a_real_tokenizer(tokenizer, text, data):
    start = data.draw(st.integers(0, len(text)))
    stop = [text[start:start + data.draw(st.integers(1, 8))] or "zz", "dog"]
    reader, plain, stream = StopText(tokenizer, stop), StopText(tokenizer, []), Utf8Stream(tokenizer)
    ids = tokenizer.encode(text)
    assert "".join(map(reader.push, ids)) + reader.flush() == until_stop(text, stop)
    assert reader.stopped == any(s in text for s in stop)
    assert [plain.push(i) for i in ids] == [stream.push(i) for i in ids]       # without stop strings: lesson 1's
    assert plain.flush() == stream.flush() and not plain.stopped


def test_special_tokens_are_not_text(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("the "), tokenizer.special("<|assistant_end|>"), *tokenizer.encode("cat")]
    reader = StopText(tokenizer, ["<|assistant_end|>", "<|bos|>"])
    assert "".join(map(reader.push, ids)) + reader.flush() == "the cat" and not reader.stopped
    spelled = tokenizer.encode("the <|bos|> cat")                                  # ordinary text that looks so
    reader = StopText(tokenizer, ["<|bos|>"])
    assert "".join(map(reader.push, spelled)) == "the " and reader.stopped


def test_a_character_left_unfinished(tokenizer):
    byte = {tokenizer.id_to_bytes(i): i for i in range(256)}
    reader = StopText(tokenizer, "🦊")
    assert [reader.push(byte[bytes([b])]) for b in "a🦊".encode()[:-1]] == ["a", "", "", ""]
    assert reader.flush() == "�" and not reader.stopped


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["a", 7], [None], None, 5, b"a", [b"a"], {"a": 1}, ["x"] * (MAX_STOPS + 1)])
def test_stop_strings_that_are_refused(tokenizer, stop):
    with pytest.raises(UserError, match="stop must be"):
        StopText(tokenizer, stop)


def test_stop_strings_that_are_taken(tokenizer):
    for stop in ("cat", ["cat"], ("cat",), ["cat"] * MAX_STOPS):
        reader = StopText(tokenizer, stop)
        assert "".join(map(reader.push, tokenizer.encode("the cat sat"))) == "the " and reader.stopped
