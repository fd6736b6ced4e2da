"Guessing changes the number of passes and not one token."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_nb.common import UserError
from nanochat_nb.engine import Engine
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.speculation import DraftModel, generate_speculatively, lookup
from nanochat_nb.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 4, 300)


def random_model(tokenizer, seed=0, **changes):
    model = GPT(GPTConfig(**{**dict(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2,
                                    n_embd=32), **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4, generator=generator)
    return model


def wrong_and_right(model, tokenizer, prompt, greedy):
    "A guesser that is right at first and then wrong, in a pattern that covers every number of agreed tokens."
    calls = []

    def draft(tokens, most):
        at, calls_so_far = len(tokens) - len(prompt), len(calls)
        calls.append(most)
        guess = greedy[at:at + most]
        agreed = calls_so_far % (most + 1)
        return guess[:agreed] + [(token + 1) % 256 for token in guess[agreed:]]

    return draft


@pytest.mark.parametrize("changes", [{}, dict(smear=True, value_embeds=True, residual_scalars=True), dict(window_pattern="SL")])
def test_same_tokens_whoever_guesses(tokenizer, changes):
    model = random_model(tokenizer, **changes)
    prompt = [tokenizer.bos, *tokenizer.encode("the cat sat on the mat")]
    greedy = Engine(model, tokenizer).generate([prompt], 100, temperature=0, stop_ids=[])[0].tokens
    drafts = {"lookup": lookup, "itself": DraftModel(model), "another": DraftModel(random_model(tokenizer, 1)),
              "nobody": lambda tokens, most: [], "pattern": wrong_and_right(model, tokenizer, prompt, greedy),
              "nonsense": lambda tokens, most: [7] * most}
    for name, draft in drafts.items():
        for most in (1, 3, 8):
            made = generate_speculatively(model, prompt, 100, draft, most)
            assert made.tokens == greedy, name
            assert made.passes + made.accepted == len(greedy) - 1 and made.accepted <= made.guessed
            if name == "itself":
                assert made.accepted == made.guessed and made.passes <= -(-99 // (most + 1))
            if name == "nobody":
                assert made.passes == len(greedy) - 1


def test_stops_and_limits(tokenizer):
    model = random_model(tokenizer)
    prompt = [tokenizer.bos, 5, 6, 7]
    greedy = Engine(model, tokenizer).generate([prompt], 60, temperature=0, stop_ids=[])[0].tokens
    for n in (0, 1, 2, 7, 60):
        assert generate_speculatively(model, prompt, n, DraftModel(model), 5).tokens == greedy[:n]
    for stop in set(greedy):
        first = greedy.index(stop)
        for draft in (lookup, DraftModel(model)):
            assert generate_speculatively(model, prompt, 60, draft, 5, [stop]).tokens == greedy[:first + 1]
    T = model.config.sequence_len
    full = generate_speculatively(model, [5] * (T - 3), 50, lambda tokens, most: [7] * most)
    assert full.tokens == Engine(model, tokenizer).generate([[5] * (T - 3)], 3, temperature=0, stop_ids=[])[0].tokens
    for prompt, most in [([], 4), ([5] * T, 4), ([5], 0)]:
        with pytest.raises(UserError):
            generate_speculatively(model, prompt, 4, most=most)


def test_draft_of_a_smaller_context(tokenizer):
    model, short = random_model(tokenizer), random_model(tokenizer, 3, sequence_len=20)
    prompt = [tokenizer.bos, 5, 6, 7]
    greedy = Engine(model, tokenizer).generate([prompt], 60, temperature=0, stop_ids=[])[0].tokens
    assert generate_speculatively(model, prompt, 60, DraftModel(short)).tokens == greedy


def test_draft_model_follows_the_text(tokenizer):
    "Its cache is as good as none: guesses are those of a fresh one, whatever it was asked before."
    model, kept = random_model(tokenizer), DraftModel(random_model(tokenizer, 1))
    generator = torch.Generator().manual_seed(0)
    tokens = [tokenizer.bos]
    for _ in range(30):
        cut = int(torch.randint(1, len(tokens) + 1, (), generator=generator))
        tokens = (tokens[:cut] + torch.randint(256, (4,), generator=generator).tolist())[:60]
        most = int(torch.randint(0, 6, (), generator=generator))
        assert kept(tokens, most) == DraftModel(kept.model)(tokens, most)
    assert model.config == kept.model.config


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_lookup_is_the_latest_longest_match(tokens, most, longest):
    guess = lookup(tokens, most, longest)
    found = []
    for n in range(1, min(longest, len(tokens) - 1) + 1):
        for start in range(len(tokens) - n):
            if tokens[start:start + n] == tokens[-n:]:
                found.append((n, start))
    if not found:
        assert guess == []
    else:
        n, start = max(found)
        assert guess == tokens[start + n:start + n + most] and guess
