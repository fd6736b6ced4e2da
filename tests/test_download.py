"Downloads against a hub that misbehaves: all ends whole and checked, or in one clear message."
import errno
import hashlib
import http.server
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_nb import download
from nanochat_nb.common import UserError, run_cli
from nanochat_nb.dataset import Documents, prepare_dataset
from nanochat_nb.download import HUB_SOURCES, download_source, fetch_shard, list_hub_shards

CLIMBMIX = HUB_SOURCES["climbmix"]
QUICK = {"wait": 0.01}


def letters(i: int, size: int = 40_000) -> str:
    rng = random.Random(i)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=size))


def parquet(texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


TEXTS = [[letters(10 * i + k) for k in range(3)] for i in range(4)]
FILES = {f"shard_{i:05d}.parquet": parquet(texts) for i, texts in enumerate(TEXTS)}
NAMES = list(FILES)


class Request:
    def __init__(self, name, handler):
        self.name, self.path = name, handler.path
        self.range = handler.headers.get("Range")
        self.authorization = handler.headers.get("Authorization")
        self.sent = 0                          # bytes of the body


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if "/resolve/" in path:
            return self.file(path.split("/resolve/")[1].split("/", 1)[1])
        question = "tree" if "/tree/" in path else "commit"
        hub.requests.append(Request(question, self))
        if fault := hub.next_fault(question):
            return self.fail(fault)
        if question == "commit":
            return self.reply(200, json.dumps({"sha": hub.commit}).encode())
        entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40,
                    "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                            "pointerSize": 130}} for name, data in hub.listing().items()]
        half = len(entries) // 2               # two pages, as the hub does with long lists
        if "page=2" in self.path:
            return self.reply(200, json.dumps(entries[half:]).encode())
        address = f"http://{self.headers['Host']}{self.path}&page=2"
        self.reply(200, json.dumps(entries[:half]).encode(), {"Link": f'<{address}>; rel="next"'})

    def file(self, name):
        hub = self.server
        request = Request(name, self)
        hub.requests.append(request)
        if hub.elsewhere:
            return self.reply(302, b"", {"Location": f"{hub.elsewhere}/resolve/{hub.commit}/{name}"})
        fault, data = hub.next_fault(name), hub.files.get(name)
        if fault in ("429", "503", "503 later", "404", "500", "401", "html") or data is None:
            return self.fail(fault or "404")
        start = int(request.range[6:-1]) if request.range and fault != "no range" else 0
        body = data[start:]
        if fault == "wrong body":
            body = bytes(len(body))
        elif fault == "short body":            # honest about its length, but not the whole file
            body = body[:-5]
        elif fault == "other range":           # not the part that was asked for
            body, start = data[1:], 1
        stop = len(body)
        if fault in ("cut", "stall", "hold"):
            stop //= 2
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "no length":
            headers["Content-Length"] = ""
        request.sent = stop
        self.reply(206 if start else 200, body, headers, stop)
        if fault in ("stall", "hold"):         # keep the connection, send nothing more
            self.wait(10 if fault == "stall" else 60)

    def wait(self, seconds):
        if not self.server.released.wait(seconds):
            self.server.too_patient = True     # no client should have waited for us

    def fail(self, fault):
        if fault == "other json":
            return self.reply(200, b'{"status": "please log in"}')
        if fault == "html":
            return self.reply(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        if fault == "cut":
            return self.reply(200, b"[" + b" " * 99, stop=50)
        if fault == "stall":
            return self.wait(10)
        headers = {"404": {"X-Error-Code": "EntryNotFound"}, "429": {"Retry-After": "1"},
                   "503 later": {"Retry-After": "100"}}
        self.reply(int(fault[:3]), b"no", headers.get(fault, {}))

    def reply(self, status, body, headers=None, stop=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:stop])
        self.wfile.flush()

    def log_message(self, *args):
        pass


class Hub(http.server.ThreadingHTTPServer):
    "The addresses of the hub that a download touches; `faults[name]` befall the next requests."
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.extra, self.faults, self.requests = dict(FILES), {}, {}, []
        self.released, self.too_patient, self.elsewhere = threading.Event(), False, ""
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def listing(self):
        return {"README.md": b"x", **self.files, **self.extra}

    def next_fault(self, name):
        return self.faults[name].pop(0) if self.faults.get(name) else ""

    def asked(self, name):
        return [request for request in self.requests if request.name == name]

    def close(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass                                   # a client that goes away is what we test


@pytest.fixture
def hub(base_dir, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def impatient(monkeypatch):
    "Where the hub stalls; elsewhere the usual 10 seconds, so that a busy machine is no fault."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)


@pytest.fixture
def text(base_dir):
    return base_dir / "data" / "climbmix" / "text"


def kept(folder: Path) -> dict[str, bytes]:
    "Everything under `text/`, hidden files too."
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else {}


def start(*flags, **env):
    return subprocess.Popen([sys.executable, "-m", "nanochat_nb.dataset", *flags], text=True,
                            env={**os.environ, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# --- what is asked for comes, and is not asked for again -------------------------------------

def test_download(hub, text, capsys):
    folder = download_source("climbmix", num_shards=2, num_workers=2)
    assert kept(text) == {name: FILES[name] for name in (NAMES[0], NAMES[1], NAMES[3])}
    assert list(Documents("climbmix")) == TEXTS[0] + TEXTS[1]
    assert list(Documents("climbmix", "val")) == TEXTS[3]            # the hub's last shard
    assert "climbmix: 3 of 3 shards, 0.4 MB, verified; 3 of them new" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["commit"] == hub.commit and len(manifest["shards"]) == 4
    assert manifest["shards"][0]["sha256"] == hashlib.sha256(FILES[NAMES[0]]).hexdigest()
    assert not (folder / "download").exists()
    (text / NAMES[1]).unlink()
    hub.requests.clear()
    download_source("climbmix", num_shards=3)                        # the lost one and a new one
    assert sorted(request.name for request in hub.requests) == [NAMES[1], NAMES[2]]


def test_when_all_is_there_no_network_is_touched(hub, text, capsys):
    download_source("climbmix")
    before = {p: p.stat().st_mtime_ns for p in text.parent.rglob("*") if p.is_file()}
    hub.close()
    download_source("climbmix")
    assert len(Documents(download_source("climbmix", num_shards=1))) == 9
    assert before == {p: p.stat().st_mtime_ns for p in text.parent.rglob("*") if p.is_file()}
    assert "4 of 4 shards, 0.5 MB, verified; 0 of them new" in capsys.readouterr().out


def test_verify_reads_again_what_is_there(hub, text, capsys):
    download_source("climbmix")
    hub.requests.clear()
    damaged = bytearray(FILES[NAMES[2]])
    damaged[1000] ^= 1
    (text / NAMES[2]).write_bytes(damaged)
    download_source("climbmix")
    assert kept(text)[NAMES[2]] == damaged                           # of the right size: believed
    download_source("climbmix", verify=True)
    assert kept(text) == FILES and [request.name for request in hub.requests] == [NAMES[2]]
    assert f"{NAMES[2]} is damaged: its SHA-256 is not the hub's" in capsys.readouterr().out


def test_shards_of_unknown_origin_are_checked(hub, text):
    text.mkdir(parents=True)
    (text / NAMES[0]).write_bytes(FILES[NAMES[0]])                   # copied from somewhere
    (text / NAMES[1]).write_bytes(bytes(len(FILES[NAMES[1]])))
    download_source("climbmix")
    assert kept(text) == FILES and not hub.asked(NAMES[0]) and len(hub.asked(NAMES[1])) == 1


def test_files_that_the_hub_does_not_have_are_refused(hub, text):
    folder = download_source("climbmix")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "revision": "an older one"}))
    del hub.files[NAMES[3]]                    # else the old validation shard would stay the last
    with pytest.raises(UserError, match=f"has 1 files that karpathy/.* lacks, such as {NAMES[3]}"):
        download_source("climbmix")
    (text / NAMES[3]).unlink()
    download_source("climbmix")
    assert list(kept(text)) == NAMES[:3]


def test_a_moving_branch_stays_where_the_first_download_found_it(hub, base_dir):
    folder = download_source("fineweb_edu", num_shards=1)
    hub.requests.clear()
    first, hub.commit = hub.commit, "f" * 40                          # the branch moves on
    download_source("fineweb_edu", num_shards=2)
    assert [f"/resolve/{first}/{NAMES[1]}" in request.path for request in hub.requests] == [True]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["shards"]                                            # as older versions wrote it
    (folder / "manifest.json").write_text(json.dumps(manifest))
    hub.requests.clear()
    download_source("fineweb_edu", num_shards=2)
    assert f"/revision/{first}" in hub.asked("commit")[0].path and not hub.asked(NAMES[0])


# --- faults of the network -------------------------------------------------------------------

def test_a_cut_is_resumed_where_it_was(hub, text):
    hub.faults = {NAMES[0]: ["cut"] * 8}      # more than the attempts: each brought something
    download_source("climbmix", **QUICK)
    requests, size = hub.asked(NAMES[0]), len(FILES[NAMES[0]])
    assert len(requests) == 9 and requests[0].range is None
    got = 0
    for request in requests[1:]:
        got += requests[requests.index(request) - 1].sent
        assert request.range == f"bytes={got}-"
    assert sum(request.sent for request in requests) == size          # no byte was sent twice
    assert kept(text) == FILES


def test_a_server_without_ranges_starts_over(hub, text):
    hub.faults = {NAMES[0]: ["cut", "no range"], NAMES[1]: ["cut", "other range"]}
    download_source("climbmix", **QUICK)
    assert kept(text) == FILES


def test_a_stall_is_a_cut(hub, text, impatient):
    hub.faults = {"tree": ["stall"], NAMES[1]: ["stall"]}
    download_source("climbmix", **QUICK)
    first, second = hub.asked(NAMES[1])[:2]
    assert not hub.too_patient and kept(text) == FILES and second.range == f"bytes={first.sent}-"


@pytest.mark.parametrize("fault", ["429", "503", "500", "html", "wrong body", "short body"])
def test_a_fault_that_passes(hub, text, fault):
    hub.faults = {NAMES[1]: [fault, fault] if fault != "429" else [fault]}
    download_source("climbmix", **QUICK)
    assert kept(text) == FILES
    assert len(hub.asked(NAMES[1])) == (2 if fault == "429" else 3)


def test_the_server_says_how_long_to_wait(hub, text, monkeypatch):
    pauses, pause = [], download._pause

    def recorded(*args):
        pauses.append(pause(*args))
        return 0.0
    monkeypatch.setattr(download, "_pause", recorded)
    hub.faults = {"commit": ["429"], NAMES[1]: ["503 later"]}         # Retry-After: 1 and 100
    download_source("climbmix", **QUICK)
    assert pauses == [1, 100] and len(hub.asked("commit")) == len(hub.asked(NAMES[1])) == 2


def test_patience_is_for_failures_in_a_row(hub, text):
    "Each break that brought something is a new beginning: 4 × 4 refusals are not too many."
    hub.faults = {NAMES[1]: (["cut"] + ["503"] * 4) * 4}
    download_source("climbmix", **QUICK)
    assert kept(text) == FILES and sum(r.sent for r in hub.asked(NAMES[1])) == len(FILES[NAMES[1]])


def test_pauses_grow_and_end(monkeypatch):
    class Reply:
        status_code, reason_phrase = 429, "Too Many Requests"

    def pause(failures=1, **headers):
        error = RuntimeError()
        error.response = Reply()
        error.response.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return download._pause(error, failures, 1.0)

    assert all(0.75 * 2**n <= pause(n + 1) <= 1.25 * 2**n for n in range(5))
    assert pause(Retry_After="40") == 40 == pause(RateLimit='"resolvers";r=0;t=40')
    assert pause(30) == 300 == pause(Retry_After="86400")
    assert pause(Retry_After="Wed, 21 Oct 2026 07:28:00 GMT") < 2


@pytest.mark.parametrize("fault, attempts, message", [
    ("404", 1, "404 Not Found"),
    ("wrong body", 5, "not a parquet file"),
    ("short body", 5, "bytes are offered, expected"),
    ("html", 5, "a web page came instead of the shard; does a login page or a proxy answer"),
])
def test_a_fault_that_stays_is_this_shards(hub, text, fault, attempts, message):
    hub.faults = {NAMES[1]: [fault] * 99}
    with pytest.raises(UserError, match=f"^1 of 4 shards could not be fetched: {NAMES[1]} "
                                        f"\\(.*{message}.*\\)\\. What came is kept"):
        download_source("climbmix", num_workers=2, **QUICK)
    assert kept(text) == {name: data for name, data in FILES.items() if name != NAMES[1]}
    assert not list((text.parent / "download").glob("*.part"))        # what is wrong is not kept
    assert len(hub.asked(NAMES[1])) == attempts                       # 404 is not asked again
    hub.faults = {}
    download_source("climbmix")
    assert kept(text) == FILES and len(hub.asked(NAMES[0])) == 1


def test_a_hub_that_stays_busy_ends_it_for_all(hub, text):
    hub.faults = {name: ["503"] * 99 for name in NAMES[1:]}
    with pytest.raises(UserError, match="3 of 4 shards .*503 Service Unavailable"):
        download_source("climbmix", num_workers=1, **QUICK)
    assert kept(text) == {NAMES[0]: FILES[NAMES[0]]}
    assert len(hub.asked(NAMES[1])) == 5 and not hub.asked(NAMES[3])


def test_the_message_names_what_ended_it(hub, text):
    hub.faults = {NAMES[0]: ["404"], NAMES[1]: ["503"] * 99}
    with pytest.raises(UserError, match=f"4 of 4 shards .*{NAMES[1]} .503 Service .* and others"):
        download_source("climbmix", num_workers=1, **QUICK)


def test_endless_and_unannounced_bodies(hub, text):
    hub.faults = {NAMES[0]: ["no length"]}
    download_source("climbmix", num_shards=1)
    assert len(hub.asked(NAMES[0])) == 1
    (text / NAMES[0]).unlink()
    hub.files[NAMES[0]] += b"x" * 1_000_000
    hub.faults = {NAMES[0]: ["no length"] * 99}
    with pytest.raises(UserError, match="more bytes came than promised"):
        download_source("climbmix", num_shards=1, **QUICK)


FAULTS = ["", "cut", "503", "wrong body", "short body", "html", "no range", "other range",
          "no length", "404"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.sampled_from(FAULTS), max_size=7), min_size=4, max_size=4))
def test_whatever_happens(tmp_path_factory, faults):
    hub, base = Hub(), tmp_path_factory.mktemp("base")
    text = base / "data" / "climbmix" / "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setenv("HF_ENDPOINT", hub.url)
        try:
            for todo in (faults, [[]] * 4):
                hub.faults = {name: list(part) for name, part in zip(NAMES, todo)}
                try:
                    download_source("climbmix", wait=0.001)
                    assert kept(text) == FILES                        # whole …
                except UserError as error:
                    assert "\n" not in str(error) and any(todo)       # … or one line,
                assert kept(text).items() <= FILES.items()            # and nothing corrupt is kept
        finally:
            hub.close()


# --- the list of shards ----------------------------------------------------------------------

def test_listing_is_complete_and_in_order(hub):
    hub.extra = {"other_00000.parquet": b"x", "shard_00009.txt": b"x"}
    commit, shards = list_hub_shards(CLIMBMIX)
    assert commit == hub.commit and [shard.origin for shard in shards] == NAMES
    assert len(hub.asked("tree")) == 2                                # both pages


def test_a_repository_without_shards(hub):
    hub.files = {NAMES[0]: FILES[NAMES[0]]}
    with pytest.raises(UserError, match="has 1 parquet files .* expected at least 2"):
        list_hub_shards(CLIMBMIX)
    with pytest.raises(UserError, match="has 0 parquet files .* expected at least 1"):
        list_hub_shards(HUB_SOURCES["smoltalk"])


@pytest.mark.parametrize("question", ["commit", "tree"])
@pytest.mark.parametrize("fault, message", [
    ("404", "404 Not Found"), ("401", "401 Unauthorized"), ("503", "503 Service Unavailable"),
    ("html", "this is no hub's answer; does a login page or a proxy"),
    ("other json", "this is no hub's answer"), ("stall", "timed out"),
])
def test_no_list_is_one_line(hub, text, impatient, question, fault, message):
    hub.faults = {question: [fault] * (1 if fault == "stall" else 2)}
    if fault in ("404", "401", "other json"):
        with pytest.raises(UserError, match=f"cannot get karpathy/climbmix.*{message}") as error:
            download_source("climbmix", **QUICK)
        assert "\n" not in str(error.value) and "--source pocket" in str(error.value)
        assert len(hub.asked(question)) == 1
    else:
        download_source("climbmix", num_shards=1, **QUICK)            # it passes
        assert len(kept(text)) == 2
        hub.faults = {question: [fault] * 99}
        with pytest.raises(UserError, match=message):
            list_hub_shards(CLIMBMIX, **QUICK)
        assert not hub.too_patient


@pytest.mark.parametrize("name", ["shard_../../../x.parquet", "shard_/../../x.parquet"])
def test_names_that_lead_out_are_refused(hub, base_dir, name):
    hub.extra = {name: FILES[NAMES[0]]}
    with pytest.raises(UserError, match="is not a shard"):
        download_source("climbmix")
    assert not list(base_dir.rglob("*.parquet"))


@pytest.mark.parametrize("change", [
    {"name": "../shard_00000.parquet"}, {"name": "/shard_00000.parquet"}, {"name": "x/../y.parquet"},
    {"name": "shard_00000.parquet\n"}, {"name": ".."}, {"more": 1}, {"origin": "../x.parquet"},
    {"origin": "/etc/x.parquet"}, {"sha256": "../../x"}, {"bytes": -1}, {"sha256": None},
])
def test_a_manifest_that_lies_is_refused(hub, text, change):
    folder = download_source("climbmix", num_shards=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = {p for p in folder.parent.rglob("*")}
    with pytest.raises(UserError, match="manifest.json is damaged .*; delete it") as error:
        download_source("climbmix")
    assert "\n" not in str(error.value) and before == {p for p in folder.parent.rglob("*")}
    (folder / "manifest.json").unlink()
    download_source("climbmix")
    assert kept(text) == FILES


def test_a_manifest_without_a_commit_is_refused(hub, text):
    path = download_source("climbmix", num_shards=1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["commit"]
    for damaged in (manifest, [], {}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="manifest.json is damaged .*; delete it"):
            download_source("climbmix", num_shards=2)


def test_nothing_is_written_through_a_link(hub, text, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    text.mkdir(parents=True)
    twin = tmp_path / "twin"
    twin.write_bytes(FILES[NAMES[2]])
    (text / NAMES[0]).symlink_to(victim)
    (text / NAMES[2]).symlink_to(twin)         # right, but not ours to keep
    (text.parent / "download").mkdir()
    sha = hashlib.sha256(FILES[NAMES[1]]).hexdigest()
    (text.parent / "download" / f"{NAMES[1]}.{sha[:16]}.part").symlink_to(victim)
    download_source("climbmix")
    assert victim.read_bytes() == b"mine" and kept(text) == FILES
    assert not any(p.is_symlink() for p in text.iterdir())


def test_the_token_stays_with_the_hub(hub, text, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    store = Hub()                              # where the hub sends who asks for a file
    try:
        hub.elsewhere, store.faults = store.url.replace("127.0.0.1", "localhost"), {NAMES[0]: ["cut"]}
        download_source("climbmix", num_shards=1, **QUICK)
        assert len(kept(text)) == 2 and store.asked(NAMES[0])[1].range
        assert all(r.authorization for r in hub.requests) and hub.asked(NAMES[0])
        assert not any(r.authorization for r in store.requests)
    finally:
        store.close()


# --- real processes --------------------------------------------------------------------------

def test_a_killed_download_goes_on(hub, text, capsys):
    hub.faults = {name: ["hold"] for name in NAMES}
    process = start("--source", "climbmix", HF_HUB_DOWNLOAD_TIMEOUT="60")
    half = {name: len(data) // 2 for name, data in FILES.items()}

    def parts():
        return sorted(p.stat().st_size for p in text.parent.glob("download/*.part"))
    try:
        wait_until(lambda: parts() == sorted(half.values()))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kept(text) == {}                    # nothing half where a shard should be
    hub.released.set()
    hub.requests.clear()
    prepare_dataset("climbmix")
    said = capsys.readouterr().out
    assert "climbmix: 4 of 4 shards, 0.5 MB, verified; 4 of them new" in said
    assert "9 documents to learn from in 3 shards, 3 for validation" in said
    assert {r.name: r.range for r in hub.requests} == {n: f"bytes={half[n]}-" for n in NAMES}
    assert kept(text) == FILES and not (text.parent / "download").exists()


def test_two_at_the_same_time(hub, text, capsys):
    hub.faults = {name: ["hold"] for name in NAMES}
    first = start("--source", "climbmix", HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_until(lambda: all(hub.asked(name) for name in NAMES))
    said = []

    def says_that_it_waits():
        said.append(capsys.readouterr().out)
        return "another process is downloading" in "".join(said)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(download_source, "climbmix")
        try:
            wait_until(says_that_it_waits)
        finally:
            hub.released.set()                 # held connections are cut and resumed
        second.result(60)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert kept(text) == FILES
    for name, data in FILES.items():           # each byte was sent once, to one of the two
        assert sum(request.sent for request in hub.asked(name)) == len(data)


def command(capsys, *flags):
    "What the command line prints to stdout and stderr, when it ends in an error."
    with pytest.raises(SystemExit) as end:
        run_cli(prepare_dataset, [*flags])
    said = capsys.readouterr()
    assert end.value.code == 2 and len(said.err.splitlines()) == 1
    return said


def test_one_missing_shard_is_one_line_and_an_exit_code(hub, text, capsys):
    del hub.files[NAMES[1]]
    hub.extra = {NAMES[1]: FILES[NAMES[1]]}    # listed, but not there
    said = command(capsys, "--source", "climbmix")
    assert f"error: 1 of 4 shards could not be fetched: {NAMES[1]}" in said.err
    assert "verified" not in said.out


def test_offline_is_one_line(hub, text, capsys, monkeypatch):
    hub.close()                                # nobody listens at this address any more
    monkeypatch.setattr(download, "_pause", lambda *args: 0.0)
    said = command(capsys, "--source", "climbmix", "--num_shards", "2")
    assert f"error: cannot get karpathy/climbmix-400b-shuffle from {hub.url}" in said.err


def test_offline_by_choice_is_one_line(hub, text, capsys, monkeypatch):
    download_source("climbmix", num_shards=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    more = command(capsys, "--source", "climbmix")
    assert "2 of 2 shards could not be fetched" in more.err and "offline" in more.err
    assert not hub.requests


def test_a_file_system_that_takes_no_more(hub, text):
    "A limit on the size of files stands for a disk that fills up in the middle of a shard."
    limit = len(FILES[NAMES[0]]) // 2
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, " \
           f"({limit}, {limit})); from nanochat_nb.common import run_cli; " \
           "from nanochat_nb.dataset import prepare_dataset; run_cli(prepare_dataset)"
    result = subprocess.run([sys.executable, "-c", code, "--source", "climbmix"], text=True,
                            capture_output=True, timeout=120)
    assert result.returncode != 0 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "4 of 4 shards" in result.stderr and os.strerror(errno.EFBIG) in result.stderr
    assert kept(text) == {} and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    download_source("climbmix")
    assert kept(text) == FILES


def test_a_full_disk_is_seen_before_and_during(hub, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: type("", (), {"free": 100_000}))
        with pytest.raises(UserError, match="need 0.5 MB, .* has 0.1 MB free; .*--num_shards"):
            download_source("climbmix")
    assert not hub.asked(NAMES[0])

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(download, "_stream", full)
    with pytest.raises(UserError, match="4 of 4 shards .*No space left on device"):
        download_source("climbmix", wait=60)   # at once: to try again would not make room


def test_an_interrupt_ends_it_soon_and_keeps_the_parts(hub, text):
    "Also those workers that wait for 100 seconds because a server said so."
    hub.faults = {name: ["hold"] * 99 if i < 2 else ["503 later"] for i, name in enumerate(NAMES)}
    process = start("--source", "climbmix", HF_HUB_DOWNLOAD_TIMEOUT="1")
    wait_until(lambda: len(list(text.parent.glob("download/*.part"))) == 2
               and all(hub.asked(name) for name in NAMES))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines() == ["interrupted"]
    assert len(list(text.parent.glob("download/*.part"))) == 2 and kept(text) == {}


def test_a_folder_that_cannot_be_made_is_one_line(hub, base_dir):
    (base_dir / "data").mkdir(parents=True)
    (base_dir / "data" / "climbmix").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="climbmix.* \\((File exists|Not a directory)\\)"):
        download_source("climbmix")


def test_shards_of_the_same_bytes(hub, text):
    hub.files[NAMES[2]] = FILES[NAMES[1]]
    hub.faults = {name: ["cut", "cut"] for name in NAMES}
    download_source("climbmix", **QUICK)
    assert kept(text) == hub.files


# --- one shard -------------------------------------------------------------------------------

def test_a_part_that_is_whole_or_too_long(hub, tmp_path):
    commit, shards = list_hub_shards(CLIMBMIX)
    for content, requests in ((FILES[NAMES[0]], 0), (FILES[NAMES[0]] + b"x", 1), (b"", 1)):
        hub.requests.clear()
        (tmp_path / "part").write_bytes(content)
        fetch_shard(CLIMBMIX, commit, shards[0], tmp_path / "shard", tmp_path / "part")
        assert (tmp_path / "shard").read_bytes() == FILES[NAMES[0]] and len(hub.requests) == requests
        assert not (tmp_path / "part").exists()


def test_progress_adds_up(hub, tmp_path):
    commit, shards = list_hub_shards(CLIMBMIX)
    hub.faults = {NAMES[0]: ["cut", "no range", "wrong body", "cut", "cut"]}
    told = []
    fetch_shard(CLIMBMIX, commit, shards[0], tmp_path / "shard", tmp_path / "part", told.append,
                **QUICK)
    assert sum(told) == shards[0].bytes


def test_conversations(hub, base_dir, capsys):
    talk = [{"role": "user", "content": "Hi! ☕"}, {"role": "assistant", "content": "Hello!"}]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"messages": [talk, talk[:1], [], talk]}), sink)
    hub.files = {"data/train-00000-of-00001.parquet": sink.getvalue().to_pybytes(),
                 "data/test-00000-of-00001.parquet": b"x"}
    folder = prepare_dataset("smoltalk")
    lines = (folder / "chat" / "smoltalk.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"messages": talk}] * 2
    assert "smoltalk: 1 of 1 shards" in capsys.readouterr().out
    download.write_conversations(folder)        # again: there is nothing to do
    pq.write_table(pa.table({"messages": [talk]}), folder / "shards" / "shard_00001.parquet")
    os.utime(folder / "shards" / "shard_00001.parquet", (2e9, 2e9))
    path = download.write_conversations(folder)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert "3 conversations" in capsys.readouterr().out
    for damaged in (b"not parquet", FILES[NAMES[0]]):
        (folder / "shards" / "shard_00001.parquet").write_bytes(damaged)
        os.utime(folder / "shards" / "shard_00001.parquet", (3e9, 3e9))
        with pytest.raises(UserError, match="cannot make .*smoltalk.jsonl .*--verify") as error:
            download.write_conversations(folder)
        assert "\n" not in str(error.value) and len(path.read_text().splitlines()) == 3
