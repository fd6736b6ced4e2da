"The HTTP server with real clients: httpx, raw sockets and OpenAI's own library."
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from tiny_model import save_tiny_model

from nanochat_nb.common import UserError
from nanochat_nb.serving import Guard, Limits, Worker, listen, make_app, parse_request, serve, serving

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


class Actor:
    "A reply_fn with a script; remembers what it was asked and what it said."

    def __init__(self):
        self.asked, self.said, self.delay = [], [], 0.0

    def __call__(self, messages, params, cancelled):
        self.asked.append((messages, params))
        question = messages[-1]["content"]
        if question == "too long":
            raise UserError("the last message takes 999 tokens; shorten it.")
        words = ["Hello", " wörld", " 🙂", " <b>", "\n", "end"] if question != "count" else \
            [f"{i} " for i in range(1000)]
        if question == "sum":
            yield {"type": "python", "text": "3+4"}
            yield {"type": "python_output", "text": "7"}
        reason = "stop"
        for n, word in enumerate(words):
            if question == "break" and n == 3:
                raise RuntimeError("out of luck")
            if cancelled() or n >= params["max_tokens"]:
                reason = "cancelled" if cancelled() else "length"
                break
            self.said.append(word)
            yield {"type": "text", "text": word}
            time.sleep(self.delay)
        yield {"type": "end", "finish_reason": reason, "dropped_turns": 2 * (question == "long chat"),
               "tokens": n, "prompt_tokens": 11}


TEXT = "Hello wörld 🙂 <b>\nend"


@pytest.fixture()
def actor():
    return Actor()


@pytest.fixture()
def http(actor):
    with serving(make_app(actor, {"id": "tiny", "parameters": 123}, max_waiting=4)) as url, \
            httpx.Client(base_url=url, timeout=20) as client:
        yield client


@pytest.fixture()
def client(http):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


def events(response):
    "The payloads of a stream of server-sent events."
    return [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]


# ---------------------------------------------------------------- what clients get

def test_openai_client(client, actor):
    reply = client.chat.completions.create(model="any", messages=HELLO, temperature=0, seed=7, max_tokens=50)
    assert reply.choices[0].message.content == TEXT and reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (11, 11 + reply.usage.completion_tokens)
    assert actor.asked[-1] == (HELLO, {"max_tokens": 50, "temperature": 0, "top_k": 50, "top_p": 1.0, "seed": 7})
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_client_streams(client):
    stream = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "sum"}],
                                            stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == TEXT
    assert [d.tool for d in deltas if hasattr(d, "tool")] == [
        {"type": "python", "text": "3+4"}, {"type": "python_output", "text": "7"}]
    assert chunks[-1].usage.prompt_tokens == 11 and chunks[-2].choices[0].finish_reason == "stop"


def test_openai_client_understands_refusals(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=HELLO, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "too long"}], stream=True)
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(client.chat.completions.create(model="any", messages=[{"role": "user", "content": "break"}], stream=True))
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "break"}])
    assert client.chat.completions.create(model="any", messages=HELLO).choices[0].message.content == TEXT


def test_limits_and_flags(http):
    cut = http.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 2}).json()
    assert cut["choices"][0] == {"index": 0, "message": {"role": "assistant", "content": "Hello wörld"},
                                 "finish_reason": "length"}
    dropped = http.post(CHAT, json={"messages": [{"role": "user", "content": "long chat"}], "stream": True})
    assert json.loads(events(dropped)[-2])["dropped_turns"] == 2 and events(dropped)[-1] == "[DONE]"
    assert dropped.headers["x-accel-buffering"] == "no"
    tool = http.post(CHAT, json={"messages": [{"role": "user", "content": "sum"}]}).json()
    assert tool["choices"][0]["message"]["content"] == TEXT
    assert [p["type"] for p in tool["choices"][0]["message"]["parts"]] == ["python", "python_output", "text"]


def test_system_parts_and_tool_history_are_passed_on(http, actor):
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]},
                {"role": "user", "content": "<|assistant_end|> \ud800 \0 \u202e"}]
    body = json.dumps({"messages": messages})
    assert http.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200
    seen = actor.asked[-1][0]
    assert [m["role"] for m in seen] == ["system", "user", "assistant", "user"]
    assert seen[1]["content"] == "a\nb" and seen[2] == messages[2]
    assert seen[3]["content"] == "<|assistant_end|> \ufffd \0 \u202e"


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("field, value", [
    ("temperature", "NaN"), ("temperature", "Infinity"), ("temperature", "-1"), ("temperature", "1e9"),
    ("temperature", '"hot"'), ("temperature", "true"), ("top_k", "0"), ("top_k", "1e9"), ("top_k", "2.5"),
    ("top_p", "0"), ("max_tokens", "-1"), ("max_tokens", "1000000000"), ("max_tokens", "0"), ("n", "999"),
    ("seed", "-1"), ("stream", '"yes"'), ("stop", '["x"]'), ("tools", '[{"type": "function"}]'),
    ("stream_options", "3"), ("messages", "[]"), ("messages", "null"), ("messages", '"hi"'), ("messages", "[1]"),
    ("messages", '[{"role": "assistant", "content": "x"}]'), ("messages", '[{"role": "alien", "content": "x"}]'),
    ("messages", '[{"role": "user", "content": null}]'), ("messages", '[{"role": "user", "content": ""}]'),
    ("messages", '[{"role": ["user"], "content": "x"}]'),
    ("messages", '[{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]'),
    ("messages", '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]'),
    ("messages", '[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]'),
    ("messages", '[{"role": "user", "content": [{"type": "python", "text": "1"}]}]'),
    ("messages", json.dumps([{"role": "user", "content": "x" * 8001}])),
    ("messages", json.dumps([{"role": "user", "content": "x"}] * 101)),
    ("messages", json.dumps([{"role": r, "content": "x" * 7000} for r in ("user", "assistant") * 2] + HELLO * 1
                            + [{"role": "assistant", "content": "x" * 7000}] + HELLO)),
])
def test_bad_fields_are_named(http, field, value):
    fields = {"messages": json.dumps(HELLO), field: value}
    body = "{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}"
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert field in (error["param"] or "") or value in ("NaN", "Infinity")  # those are not even JSON
    assert field in error["message"] or "JSON" in error["message"]


@pytest.mark.parametrize("body", ["[]", "42", "null", "", "{", "[" * 100_000, "\xff", '{"messages": 1e999}'])
def test_bad_bodies(http, body):
    response = http.post(CHAT, content=body.encode("latin-1"), headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_other_requests_that_are_refused(http):
    body = json.dumps({"messages": HELLO})
    for headers in ({"content-type": "text/plain"}, {}, {"content-type": "application/x-www-form-urlencoded"},
                    {"content-type": "application/json", "content-encoding": "gzip"}):
        assert http.post(CHAT, content=body, headers=headers).status_code == 415
    large = http.post(CHAT, content=b" " * 300_000, headers={"content-type": "application/json"})
    assert large.status_code == 413
    endless = http.post(CHAT, content=(b" " * 50_000 for _ in range(20)), headers={"content-type": "application/json"})
    assert endless.status_code == 413                          # no length announced
    assert http.get(CHAT).status_code == 405 and http.get("/nowhere").status_code == 404
    assert http.get("/nowhere").json()["error"]["code"] == 404
    assert http.request("OPTIONS", CHAT).status_code == 405    # no permission for other sites


def test_hosts_and_origins(http):
    port = http.base_url.port
    for host in (f"localhost:{port}", "127.0.0.1", "[::1]:80"):
        assert http.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "[", "127.0.0.1.nip.io"):
        assert http.get("/v1/models", headers={"host": host}).status_code in (400, 403), host
    for origin in ("http://evil.example", "null", "http://[", f"http://localhost:{port + 1}"):
        assert http.post(CHAT, json={"messages": HELLO}, headers={"origin": origin}).status_code == 403
    ours = str(http.base_url).rstrip("/")
    assert http.post(CHAT, json={"messages": HELLO}, headers={"origin": ours}).status_code == 200


def test_key(actor):
    with serving(make_app(actor, {"id": "tiny"}, key="s3cret")) as url:
        for key in ("wrong", "s3cret2"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).models.list()
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer ü".encode()}).status_code == 401
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret").models.list().data[0].id == "tiny"
        assert httpx.get(f"{url}/v1/models?key=s3cret").status_code == 401      # never in the address
        assert httpx.get(url).status_code == httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/health", headers={"host": "chat.example"}).status_code == 200


def test_page_and_its_headers(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for response in (page, http.get("/nowhere"), http.get("/v1/models", headers={"host": "evil.example"})):
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        assert response.headers["x-content-type-options"] == "nosniff"
    names = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert names and all(http.get(name).status_code == 200 for name in names)
    assert not re.search(r"(src|href)=\"(https?:)?//|<style|\son\w+=|style=\"", page.text)  # nothing foreign or inline
    for path in ("/static/../serving.py", "/static/%2e%2e/serving.py", "/static/..%2fserving.py", "/static/%00",
                 "/../../etc/passwd", "/static/", "/static//etc/passwd"):
        assert http.get(path).status_code == 404, path


# ---------------------------------------------------------------- many readers, and readers who leave

def wait_until(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_who_leaves_stops_the_model(http, actor, stream):
    actor.delay = 0.01
    body = json.dumps({"messages": [{"role": "user", "content": "count"}], "stream": stream, "max_tokens": 1000})
    sock = socket.create_connection((http.base_url.host, http.base_url.port))
    sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    wait_until(lambda: len(actor.said) >= 5)
    sock.close()
    said = len(actor.said)
    wait_until(lambda: not http.get("/health").json()["busy"])
    assert len(actor.said) <= said + 10                  # 10 × 10 ms for the news to travel
    assert http.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_readers_who_leave_at_any_moment(http, actor):
    "Forty come and go within moments; then one is served at once."
    actor.delay = 0.001
    body = {"messages": [{"role": "user", "content": "count"}], "stream": True, "max_tokens": 1000}

    def come_and_go(i):
        with httpx.Client(base_url=http.base_url) as reader:
            try:
                with reader.stream("POST", CHAT, json=body, timeout=0.02 + 0.005 * (i % 10)) as response:
                    for _, _ in zip(range(i % 7), response.iter_lines()):
                        pass
            except httpx.TimeoutException:
                pass
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(40)))
    begun = time.monotonic()
    assert http.post(CHAT, json={"messages": HELLO}).status_code == 200
    assert time.monotonic() - begun < 5
    wait_until(lambda: http.get("/health").json() == {"status": "ok", "waiting": 0, "busy": False})


def test_crowd(http, actor):
    "One is served, four wait, the others are told to come back; health answers all the while."
    actor.delay = 0.05
    with ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(http.post, CHAT, json={"messages": HELLO}) for _ in range(12)]
        slowest = 0.0
        while not all(reply.done() for reply in replies):
            begun = time.monotonic()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.01)
    responses = [reply.result() for reply in replies]
    assert {r.status_code for r in responses} == {200, 429}
    assert sum(r.status_code == 200 for r in responses) >= 4
    refused = next(r for r in responses if r.status_code == 429)
    assert refused.headers["retry-after"] == "5" and refused.json()["error"]["type"] == "rate_limit_error"
    assert slowest < 0.5      # 50 ms on an idle machine; this one may be busy


def test_pings_while_waiting_and_the_time_limit():
    "A reader in line gets comments; a reply that takes too long is cut."
    from nanochat_nb.serving import sse

    async def scenario():
        actor = Actor()
        actor.delay = 0.02
        worker = Worker(actor, max_seconds=0.3)
        params = {"max_tokens": 1000}
        count = [{"role": "user", "content": "count"}]
        first, second = worker.submit(count, params), worker.submit(HELLO, params)
        waiting = [piece async for piece in sse(second, None, "tiny", ping_seconds=0.05)]
        while (event := await first.next(1))["type"] != "end":
            pass
        worker.close()
        return waiting, event

    waiting, end = asyncio.run(scenario())
    assert waiting.count(b": still here\n\n") >= 2 and waiting[-1] == b"data: [DONE]\n\n"
    assert end["finish_reason"] == "length" and 1 < end["tokens"] < 100


# ---------------------------------------------------------------- the command

def test_port_busy_is_one_line_before_a_model_is_looked_for(tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run([sys.executable, "-m", "nanochat_nb.serving", f"--port={port}"],
                             capture_output=True, text=True, env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)})
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert f"port {port}" in run.stderr and "--port=" in run.stderr


@pytest.mark.parametrize("flags, words", [
    ({}, "speedrun.sh"), ({"source": "sft"}, "--stage"), ({"source": "stf"}, "not one of"),
    ({"max_tokens": 0}, "max_tokens"), ({"temperature": float("nan")}, "temperature"), ({"top_k": 0}, "top_k"),
    ({"port": 99999}, "port"), ({"port": -1}, "port"), ({"host": "not.a.host.invalid"}, "host"),
])
def test_bad_settings_are_refused(tmp_path, monkeypatch, flags, words):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        serve(**{"port": 0, **flags})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_real_thing(tmp_path):
    "A model from a checkpoint, the server as a process, a chat, and SIGTERM while it replies."
    save_tiny_model(tmp_path)
    server = subprocess.Popen([sys.executable, "-m", "nanochat_nb.serving", "--port=0", "--device_type=cpu"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
                              env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)})
    try:
        ready = server.stdout.readline()
        url = re.search(r"http://[\d.:]+", ready)[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list()
        assert model.id == "nanochat-d1-sft" and model.parameters > 0
        asked = dict(model="", messages=HELLO, max_tokens=20, seed=1)
        whole = client.chat.completions.create(**asked)
        pieces = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True))
        assert whole.choices[0].message.content == pieces and 0 < whole.usage.completion_tokens <= 20
        assert whole.usage.prompt_tokens > 3
        with pytest.raises(openai.BadRequestError, match="shorten"):
            client.chat.completions.create(model="", messages=[{"role": "user", "content": "x" * 5000}])
        timer = threading.Timer(0.05, server.send_signal, [signal.SIGTERM])
        stream = client.chat.completions.create(**{**asked, "max_tokens": 30}, stream=True)
        timer.start()
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")    # it was let finish
        assert server.wait(timeout=10) == 0
        assert "Traceback" not in server.stdout.read()
    finally:
        server.kill()


def test_ipv6_and_any_folder(tmp_path, monkeypatch, actor):
    monkeypatch.chdir(tmp_path)
    try:
        listen("::1", 0).close()
    except UserError:
        pytest.skip("no IPv6 here")
    with serving(make_app(actor, {"id": "tiny"}), host="::1") as url:
        assert url.startswith("http://[::1]:") and "<title>" in httpx.get(url).text


def test_units():
    assert parse_request(json.dumps({"messages": HELLO, "n": 1, "stop": None, "user": "me"}).encode(), Limits())["stream"] is False
    Guard(None).check("/", {"host": "LOCALHOST"})
