"The engine against the naive full forward: mixed lengths, reused slots, arrivals and cancels, seeds, hooks, limits."
import gc
import random
import threading

import pytest
import torch

from nanochat_nb.attention import KVCache
from nanochat_nb.common import UserError
from nanochat_nb.engine import Completion, DecodeGraphs, Engine, fit_prompt, step_cost
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.optimizer import setup_optimizer
from nanochat_nb.quantization import matrix_bytes, pack
from nanochat_nb.tokenizer import Tokenizer, Utf8Stream

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 4, 300)


KINDS = {"full": {}, "window, shared heads": dict(n_kv_head=2, window_pattern="SL"),
         "additions": dict(value_embeds=True, residual_scalars=True, smear=True, backout=True, qk_scale=1.2)}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tokenizer):
    "Random weights in every layer: an initialised GPT would ignore its attention, whose output is 0."
    extra = KINDS[request.param]
    config = dict(sequence_len=288, vocab_size=tokenizer.vocab_size, n_layer=3, n_head=4, n_kv_head=4, n_embd=64)
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
    done = Engine(model, tokenizer, 4).generate(prompts[:8], 200, temperature=0, stop_ids=stop_ids)
    for prompt, completion in zip(prompts, done):
        assert completion.tokens == naive(model, prompt, 200, stop_ids)
        assert completion.finish_reason == ("stop" if completion.tokens[-1] in stop_ids else "length")
    assert {c.finish_reason for c in done} >= {"stop"}


def test_200_tokens_in_reused_slots(model, tokenizer, prompts):
    done = Engine(model, tokenizer, 3).generate(prompts[:7], 200, temperature=0, stop_ids=[])
    assert [c.tokens for c in done] == [naive(model, prompt, 200) for prompt in prompts[:7]]


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
    for prompt in (full, full + [6]):
        with pytest.raises(UserError, match=f"context of {T}"):
            engine.generate([prompt], 10, overlong="refuse")
    last = engine.generate([full[:-1]], 10, temperature=0, stop_ids=[], overlong="refuse")[0]
    assert last.tokens == naive(model, full[:-1], 1) and last.finish_reason == "length"
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
                                 dict(max_tokens=-1), dict(seed=[1, 2]), dict(overlong="maybe"), dict(min_p=2.0),
                                 dict(repetition_penalty=0.0), dict(stop=[""]), dict(temperature=float("nan"))])
def test_bad_settings_are_refused(model, tokenizer, bad):
    with pytest.raises(UserError):
        Engine(model, tokenizer).generate([[tokenizer.bos]], **bad)


def test_foreign_ids_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="another tokenizer"):
        Engine(model, tokenizer).generate([[tokenizer.bos, 10**6]])


def test_stream_of_text_is_whole(model, tokenizer):
    tokens = [t for t, _ in Engine(model, tokenizer).stream([tokenizer.bos], 200, temperature=2.0, top_k=0, stop_ids=[])]
    stream = Utf8Stream(tokenizer)
    assert "".join(map(stream.push, tokens)) + stream.flush() == tokenizer.decode(tokens)


def test_text_ends_before_a_stop_text(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    how = dict(temperature=2.0, top_k=0, seed=3, stop_ids=[])
    plain = engine.generate([prompts[5]], 120, **how)[0]
    assert plain.text == tokenizer.decode([t for t in plain.tokens if t not in tokenizer.special_ids])
    stop = [plain.text[30:34], plain.text[20:23]]
    cut = engine.generate([prompts[5]], 120, stop=stop, **how)[0]
    assert cut.finish_reason == "stop" and cut.tokens == plain.tokens[:len(cut.tokens)] and len(cut.tokens) < 120
    assert cut.text == plain.text[:min(plain.text.find(s) for s in stop)]
    assert "".join(engine.write(prompts[5], 120, stop=stop, **how)) == cut.text


def test_every_request_has_its_own_dials(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    hows = [dict(temperature=0), dict(temperature=0.7, top_k=5), dict(top_p=0.8, min_p=0.05), dict(repetition_penalty=1.5)]
    asked = [engine.request(prompts[i], 25, seed=i, stop_ids=[], **hows[i % 4]) for i in range(12)]
    engine.submit(*asked)
    while engine.step():
        pass
    for i, request in enumerate(asked):
        alone = Engine(model, tokenizer).generate([prompts[i]], 25, seed=[i], stop_ids=[], **hows[i % 4])[0]
        assert request.completion == alone


def caches():
    gc.collect()
    return sum(type(x) is KVCache for x in gc.get_objects())


def test_thousands_of_arrivals_and_cancels_leak_nothing(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=48, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    rng, engine, before = random.Random(0), Engine(model, tokenizer, max_batch=5), caches()
    live, ended = [], []
    for _ in range(3000):
        if rng.random() < 0.6:
            seed, prompt = rng.randrange(30), [rng.randrange(256) for _ in range(rng.randrange(12))]
            live.append((seed, engine.request(prompt, rng.randrange(0, 14), seed=seed, stop_ids=[7, 8, 9, 10, 11])))
            engine.submit(live[-1][1])
        if live and rng.random() < 0.15:
            engine.cancel(*(r for _, r in rng.sample(live, min(2, len(live)))))
        drawn = engine.step()
        assert len(drawn) <= 5 and (engine.slots is None or engine.slots.cache.batch_size <= 5)
        ended += [pair for pair in live if pair[1].done]
        live = [pair for pair in live if not pair[1].done]
    while engine.step():
        pass
    ended += live
    assert len(ended) > 1500 and engine.slots is None and not engine.waiting and caches() == before
    keys = sorted({(seed, *request.prompt) for seed, request in ended})
    whole = Engine(model, tokenizer).generate([list(prompt) for _, *prompt in keys], 14, seed=[seed for seed, *_ in keys],
                                              stop_ids=[7, 8, 9, 10, 11])
    whole, reasons = dict(zip(keys, whole)), {}
    for seed, request in ended:
        c = request.completion
        reasons[c.finish_reason] = reasons.get(c.finish_reason, 0) + 1
        assert c.tokens == whole[(seed, *request.prompt)].tokens[:len(c.tokens)]
        if c.finish_reason == "length":
            assert len(c.tokens) == request.max_tokens
        elif c.finish_reason == "stop":
            assert c.tokens[-1] in (7, 8, 9, 10, 11)
    assert min(reasons[reason] for reason in ("length", "cancelled", "stop")) > 20


def test_threads_share_one_batch(model, tokenizer, prompts):
    alone = [Engine(model, tokenizer).generate([p], 40, seed=[i], stop_ids=[])[0].tokens for i, p in enumerate(prompts[:6])]
    engine, got, widths = Engine(model, tokenizer), {}, []
    step, start = engine.step, threading.Barrier(6)

    def watched():
        drawn = step()
        widths.append(len(drawn))
        return drawn

    engine.step = watched

    def read(i):
        start.wait()
        stream = engine.stream(prompts[i], 40, seed=i, stop_ids=[])
        got[i] = [token for token, _ in (stream if i else (next(stream) for _ in range(5)))]
        stream.close()                                  # reader 0 leaves early

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {i: alone[i][:40 if i else 5] for i in range(6)}
    assert max(widths) > 1 and engine.slots is None and not engine.waiting


def test_new_weights_are_noticed(tokenizer, prompts):
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    engine, optimizer = Engine(model, tokenizer), setup_optimizer(model, matrix_lr=0.3, unembedding_lr=0.3)
    packed = engine._weights_now()
    assert engine._weights_now() is packed
    for _ in range(3):
        idx = torch.tensor([prompts[1][:40]])
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.submit(request := engine.request(prompts[4], 5, stop_ids=[]))
        engine.step()
        used, logits = engine.slots.model, engine.slots.logits
        assert used is not packed and torch.allclose(logits, model(torch.tensor([request.prompt]))[:, -1], atol=1e-4)
        engine.cancel(request)
        packed = used


def test_a_step_that_fails_ends_all_and_the_engine_goes_on(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)

    def hook(token):
        raise RuntimeError("the tool broke")

    others = [engine.request(p, 20, stop_ids=[]) for p in prompts[:3]]
    engine.submit(*others)
    with pytest.raises(RuntimeError, match="the tool broke"):
        list(engine.stream(prompts[3], 20, stop_ids=[], hook=hook))
    assert [r.completion.finish_reason for r in others] == ["cancelled"] * 3 and engine.slots is None
    assert engine.generate([prompts[4]], 12, temperature=0, stop_ids=[])[0].tokens == naive(model, prompts[4], 12)


def record_by_calling(step, reset):
    "A stand-in for a CUDA graph: calls the step again, and puts the result where the recording has it."
    step()
    reset()
    result = step().clone()
    reset()
    return lambda: result.copy_(step()), result


def test_recorded_steps_equal_plain_ones(model, tokenizer, prompts):
    recorded = Engine(model, tokenizer, max_batch=6)
    recorded.submit(*(asked := [recorded.request(p, 9 + 11 * i, temperature=0, stop_ids=[]) for i, p in enumerate(prompts[:9])]))
    recorded.step()
    graphs = recorded.slots.graphs = DecodeGraphs(recorded.slots.model, record_by_calling)
    with torch.inference_mode():
        while recorded.step():
            pass
    assert {rows for rows, _ in graphs.made} >= {1, 2, 4} and graphs.works
    for request, prompt in zip(asked, prompts):
        assert request.completion.tokens == naive(model, prompt, request.max_tokens)


def test_a_step_that_cannot_be_recorded_is_run(model, tokenizer, prompts):
    def record(step, reset):
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = Engine(model, tokenizer)
    engine.submit(request := engine.request(prompts[2], 10, temperature=0, stop_ids=[]))
    engine.step()
    engine.slots.graphs = DecodeGraphs(engine.slots.model, record)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        engine.step()
    while engine.step():
        pass
    assert request.completion.tokens == naive(model, prompts[2], 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(model, tokenizer, prompts):
    on_gpu = GPT(model.config).cuda()
    on_gpu.load_state_dict(model.state_dict())
    done = Engine(on_gpu, tokenizer, 5).generate(prompts, 60, temperature=0, stop_ids=[])
    plain = Engine(on_gpu, tokenizer, 5)
    plain.submit(*(asked := [plain.request(p, 60, temperature=0, stop_ids=[]) for p in prompts]))
    while plain.step():
        if plain.slots:
            plain.slots.graphs = None
    same = [a.tokens == b.completion.tokens for a, b in zip(done, asked)]
    assert sum(same) >= len(same) - 1                   # a tie within rounding may fall either way


def test_cost_counts_what_a_pass_does(model):
    from torch.utils.flop_counter import FlopCounterMode
    packed, c = pack(model), model.config
    for rows, new, stored in [(1, 1, 0), (3, 1, 40), (2, 30, 0)]:
        cache = KVCache.for_model(model, rows, stored + new)
        idx = torch.randint(c.vocab_size, (rows, stored + new))
        with torch.inference_mode():
            if stored:
                model.hidden(idx[:, :stored], kv_cache=cache)
            with FlopCounterMode(display=False) as counter:
                model.logits(model.hidden(idx[:, stored:], kv_cache=cache)[:, -1])
        flops, read = step_cost(c, matrix_bytes(packed), rows, new, stored)
        attended = sum(min(stored + t, c.window(layer) if c.window(layer) >= 0 else 10**9) + 1
                       for layer in range(c.n_layer) for t in range(new))
        attention = 4 * rows * c.n_head * c.head_dim * attended
        counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
        gates = 2 * rows * new * (sum(map(c.has_value_embed, range(c.n_layer))) * c.n_kv_head * 12 + 24 * c.smear)
        assert flops == counted - gates + attention
        assert read == matrix_bytes(packed) + 2 * c.n_layer * c.n_kv_head * c.head_dim * 4 * rows * (stored + new)
