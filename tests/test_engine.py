"The engine against the naive full forward: mixed lengths, reused slots, seeds, hooks, limits."
import pytest
import torch

from nanochat_nb.common import UserError
from nanochat_nb.engine import Completion, Engine, fit_prompt, next_token_probabilities, sample
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer, Utf8Stream

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 4, 300)


@pytest.fixture(scope="module", params=["full", "window, shared heads"])
def model(request, tokenizer):
    "Random weights in every layer: an initialised GPT would ignore its attention, whose output is 0."
    extra = {} if request.param == "full" else dict(n_kv_head=2, window_pattern="SL")
    config = dict(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=3, n_head=4, n_kv_head=4, n_embd=64)
    model = GPT(GPTConfig(**{**config, **extra}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3 if p.ndim == 2 and p.size(0) != tokenizer.vocab_size else 1.0, generator=generator)
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer):
    "24 prompts of 1 … 70 tokens, some of them equal."
    g = torch.Generator().manual_seed(1)
    lengths = [1, 70, 3, 3, 25, 40, 1, 64] + torch.randint(1, 50, (12,), generator=g).tolist()
    rows = [[tokenizer.bos, *torch.randint(256, (n - 1,), generator=g).tolist()] for n in lengths]
    return rows + rows[4:8]


@torch.inference_mode()
def naive(model, prompt, max_tokens, stop_ids=()):
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt):]


def test_greedy_equals_full_forward_in_every_row(model, tokenizer, prompts):
    expected = [naive(model, prompt, 40) for prompt in prompts]
    for max_batch in (1, 5, 64):     # 5 slots for 24 requests: slots are reused
        done = Engine(model, tokenizer, max_batch).generate(prompts, 40, temperature=0, stop_ids=[])
        assert [c.tokens for c in done] == expected
        for completion in done:
            assert completion.finish_reason == "length" and not any(completion.forced)


def test_200_tokens_with_stops(model, tokenizer, prompts):
    stop_ids = {naive(model, prompts[4], 60)[-1], naive(model, prompts[0], 20)[-1]}   # ids that do occur
    done = Engine(model, tokenizer, 4).generate(prompts[:8], 180, temperature=0, stop_ids=stop_ids)
    for prompt, completion in zip(prompts, done):
        assert completion.tokens == naive(model, prompt, 180, stop_ids)
        assert completion.finish_reason == ("stop" if completion.tokens[-1] in stop_ids else "length")
    assert {c.finish_reason for c in done} >= {"stop"}


def test_neighbours_do_not_matter(model, tokenizer, prompts):
    seeds = [1000 + i for i in range(len(prompts))]
    alone = [Engine(model, tokenizer).generate([p], 30, seed=s, stop_ids=[])[0] for p, s in zip(prompts, seeds)]
    for max_batch, order in [(64, 1), (7, 1), (3, -1)]:
        crowd = Engine(model, tokenizer, max_batch).generate(prompts[::order], 30, seed=seeds[::order], stop_ids=[])
        assert crowd[::order] == alone
    streamed = list(Engine(model, tokenizer).stream(prompts[1], 30, seed=seeds[1], stop_ids=[]))
    assert [t for t, _ in streamed] == alone[1].tokens


def test_one_seed_gives_each_request_its_own_stream(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    same_prompt = engine.generate([prompts[4]] * 6, 20, seed=3, stop_ids=[])
    assert len({tuple(c.tokens) for c in same_prompt}) == 6
    assert engine.generate([prompts[4]] * 6, 20, seed=3, stop_ids=[]) == same_prompt
    longer = engine.generate([prompts[4]] * 6, 40, seed=3, stop_ids=[])
    assert [c.tokens[:20] for c in longer] == [c.tokens for c in same_prompt]
    assert engine.generate([prompts[4]] * 2, 20, seed=None) != engine.generate([prompts[4]] * 2, 20, seed=None)


def test_forced_tokens(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    made = []

    def factory():
        seen = []
        made.append(seen)

        def hook(token):
            seen.append(token)
            return [7, 8, 9] if len(seen) % 4 == 0 else []
        return hook

    done = engine.generate(prompts[:5], 20, temperature=0, stop_ids=[], hook_factory=factory)
    assert len(made) == 5
    for completion, seen, prompt in zip(done, made, prompts):
        assert completion.forced == ([False] * 4 + [True] * 3) * 2 + [False] * 4 + [True] * 2
        assert [t for t, f in zip(completion.tokens, completion.forced) if f] == [7, 8, 9, 7, 8, 9, 7, 8]
        assert [t for t, f in zip(completion.tokens, completion.forced) if not f] == seen
        for i, (token, forced) in enumerate(zip(completion.tokens, completion.forced)):
            assert forced or naive(model, prompt + completion.tokens[:i], 1) == [token]


def test_limits(model, tokenizer, prompts):
    engine, T = Engine(model, tokenizer), model.config.sequence_len
    assert engine.generate([prompts[1]], 0) == [Completion([], [], "length")]
    assert list(engine.stream(prompts[1], 0)) == []
    assert engine.generate([]) == []
    assert len(engine.generate([[]], 4, stop_ids=[])[0].tokens) == 4
    full = [tokenizer.bos] + [5] * (T - 1)
    for prompt in (full, full + [6] * 100, full[:-1], full[:T - 10]):
        cut = fit_prompt(prompt, 10, T, tokenizer.bos)
        assert len(cut) == T - 10 and cut[0] == tokenizer.bos and cut[1:] == prompt[-(T - 11):]
        assert engine.generate([prompt], 10, temperature=0, stop_ids=[])[0].tokens == naive(model, cut, 10)
    short = engine.generate([full[:100]], 10_000, stop_ids=[])[0]      # ends where the context ends
    assert (len(short.tokens), short.finish_reason) == (T - 100, "length")
    # … and a prompt that leaves less than half of it is cut to half
    assert len(engine.generate([full + full], 10_000, stop_ids=[])[0].tokens) == T // 2


def test_cancel_and_close(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    got = []
    stream = engine.stream(prompts[2], 50, stop_ids=[], cancelled=lambda: len(got) >= 3)
    try:
        while True:
            got.append(next(stream))
    except StopIteration as end:
        assert end.value == "cancelled"
    assert len(got) == 3
    done = Engine(model, tokenizer, 2).generate(prompts[:6], 50, cancelled=lambda: True)
    assert done == [Completion([], [], "cancelled")] * 6
    stream = engine.stream(prompts[2], 50)
    next(stream)
    stream.close()
    assert not torch.is_inference_mode_enabled()


def test_training_goes_on_after_generating(model, tokenizer, prompts):
    stream = Engine(model, tokenizer).stream(prompts[2], 50, stop_ids=[])
    next(stream)
    idx = torch.tensor([prompts[1]])
    model(idx[:, :-1], idx[:, 1:]).backward()      # in the middle of a stream
    assert next(stream)
    model.zero_grad()


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-2),
                                 dict(max_tokens=-1), dict(seed=[1, 2])])
def test_bad_settings_are_refused(model, tokenizer, bad):
    with pytest.raises(UserError):
        Engine(model, tokenizer).generate([[tokenizer.bos]], **bad)


def test_foreign_ids_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="another tokenizer"):
        Engine(model, tokenizer).generate([[tokenizer.bos, 10**6]])


def test_probabilities_and_draws():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    full, ids = next_token_probabilities(logits)
    assert torch.equal(ids[1], torch.arange(50)) and torch.allclose(full, logits.softmax(-1))
    kept, ids = next_token_probabilities(logits, temperature=0.7, top_k=5)
    expected = (logits / 0.7).topk(5)
    assert torch.equal(ids, expected.indices) and torch.allclose(kept, expected.values.softmax(-1))
    nucleus, ids = next_token_probabilities(logits, top_p=0.5)
    for row in range(3):
        inside = nucleus[row] > 0
        mass = full[row][ids[row][inside]]
        assert mass.sum() >= 0.5 > mass[:-1].sum() and abs(nucleus[row].sum() - 1) < 1e-6
    almost_one = torch.full((3,), 1 - 2**-24)
    for top_p in (0.5, 1.0):                       # the very last number still draws a possible token
        drawn = sample(logits, almost_one, top_p=top_p)
        probabilities, ids = next_token_probabilities(logits, top_p=top_p)
        assert all(probabilities[r][ids[r] == drawn[r]] > 0 for r in range(3))
    assert torch.equal(sample(logits, torch.rand(3), temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, torch.rand(3), temperature=1e-40), logits.argmax(-1))


def test_stream_of_text_is_whole(model, tokenizer):
    tokens = [t for t, _ in Engine(model, tokenizer).stream([tokenizer.bos], 200, temperature=2.0, top_k=0, stop_ids=[])]
    stream = Utf8Stream(tokenizer)
    assert "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)
