"The sandbox for model-written code: what must be stopped, what must pass, and the refusal elsewhere."
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from nanochat_nb import execution
from nanochat_nb.execution import (DENIED, SandboxUnavailable, extract_code, remove_tree, run_code,
                                   run_many, run_tests, sandbox_level)

kernel = pytest.mark.skipif(sandbox_level() != "kernel", reason=f"no kernel sandbox: {execution._probe()}")
ADD = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"


def test_prints_level(capsys):
    with capsys.disabled():
        print(f"\nsandbox level: {sandbox_level()} {execution._probe()}")


# ----- a pass is a pass only after the last test

@kernel
@pytest.mark.parametrize("code", [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "def add(a, b): raise SystemExit",
    "import atexit, os; atexit.register(os._exit, 0)",
    "import os\ndef add(a, b): os._exit(0)",
    "class Yes:\n def __eq__(self, other): return True\ndef add(a, b): return Yes()",
    "class Yes(int):\n def __eq__(self, other): return True\ndef add(a, b): return Yes(0)",
    "import builtins\nbuiltins.AssertionError = SystemExit\ndef add(a, b): return 0",
    "def check(*a): pass\ndef add(a, b): return 0",
    "import sys\nsys.settrace(lambda *a: None)\ndef add(a, b): return 0",
    "import os, sys\nfor fd in (1, 2, 3, 4):\n try: os.write(fd, b'ready\\nok\\n\"\"\\n')\n except OSError: pass",
    "import os\nos.close(2); os.close(3)\ndef add(a, b): return a + b\n",
    "def add(a, b): return a - b",
    "add = 5",
    "",
    "def add(a, b) return a + b",
])
def test_false_pass(code):
    result = run_tests(code, ADD, "add")
    assert not result.ok and result.error and not result.timed_out


@kernel
def test_right_solutions_pass():
    assert run_tests("def add(a, b): return a + b", ADD, "add").ok
    assert run_tests("def add(a, b): return a + b\nif __name__ == '__main__': input()", ADD, "add").ok
    nested = "def add(a, b): return {'x': [(a + b, {b}, None)], 'y': b'z'}"
    assert run_tests(nested, "assert add(1, 2) == {'x': [(3, {2}, None)], 'y': b'z'}", "add").ok


@kernel
def test_all_of_humaneval():
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    if not folder:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    lines = (Path(folder) / "tasks" / "humaneval.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    jobs = [{"code": p["prompt"] + p["canonical_solution"], "entry_point": p["entry_point"],
             "tests": f"{p['test']}\ncheck({p['entry_point']})\n", "timeout": 20} for p in problems]
    results = run_many(jobs)
    failed = {p["task_id"]: r.error for p, r in zip(problems, results) if not r.ok}
    assert len(results) >= 100 and not failed, failed
    wrong = [{**job, "code": job["code"].split('"""')[0] + '""""""\n    return None\n'} for job in jobs[:20]]
    assert not any(r.ok for r in run_many(wrong))


# ----- limits

@kernel
@pytest.mark.parametrize("code", [
    "while True: pass",
    "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "import time; time.sleep(60)",
    "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)",
])
def test_time_limit(code):
    began = time.monotonic()
    result = run_code(code, timeout=0.5)
    assert result.timed_out and not result.ok and "0.5 s" in result.error
    assert time.monotonic() - began < 3  # the limit is 0.5 s; the rest is a busy machine


@kernel
@pytest.mark.parametrize("code", [
    "bytearray(10**9)",
    "import mmap; mmap.mmap(-1, 10**9)",
    "x = []\nwhile True: x.append(bytearray(10**6))",
])
def test_memory_limit(code):
    result = run_code(code, timeout=20)
    assert not result.ok and re.search("MemoryError|Cannot allocate", result.error)


@kernel
def test_output_is_cut():
    result = run_code("for _ in range(50): print('x' * 10**6)", timeout=20)
    assert result.ok and result.truncated and len(result.output) == 65536
    assert not run_code("print('x' * 100)").truncated
    result = run_code("import sys\nsys.stderr.write('to the other channel')")
    assert result.ok and "other channel" in result.output


@kernel
def test_odd_text():
    assert run_code("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')").output == "\ufffd\ufffd"
    assert run_code("#" * 200_000 + "\nprint('long')").output == "long\n"
    for code in ("x = '\ud800'", "x = '\0'", "print('\\ud800')"):
        result = run_code(code)
        assert not result.ok and result.error
    assert run_code("print('MemoryError')").error == ""
    assert run_code("class E(Exception):\n def __str__(self): raise E\nraise E").error.startswith("E")


# ----- files, network, processes

@kernel
@pytest.mark.parametrize("code", [
    "open('/etc/passwd').read()",
    "open('/proc/self/environ').read()",
    "import os; os.listdir('/')",
    "import os; os.listdir(OUTSIDE)",
    "open(OUTSIDE + '/secret').read()",
    "open(OUTSIDE + '/secret', 'w')",
    "import os; os.unlink(OUTSIDE + '/secret')",
    "import os; os.rename(OUTSIDE + '/secret', 'mine')",
    "import os; os.truncate(OUTSIDE + '/secret', 0)",
    "import os; os.chmod(OUTSIDE + '/secret', 0)",
    "import os; os.chown(OUTSIDE + '/secret', 1, 1)",
    "import os; os.setxattr(OUTSIDE + '/secret', 'user.x', b'1')",
    "import os; os.symlink(OUTSIDE, 'way-out')",
    "import os; os.link(OUTSIDE + '/secret', 'way-out')",
    "import os; os.mkfifo(OUTSIDE + '/fifo')",
    "open('/dev/kmsg', 'w')",
    "import socket; socket.socket()",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "import socket; socket.socket(socket.AF_UNIX)",
    "import socket; socket.socketpair()",
    "import urllib.request; urllib.request.urlopen('http://169.254.169.254/')",
    "import os; os.fork()",
    "import posix; posix.fork()",
    "import os; os.forkpty()",
    "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "import os; os.execv('/bin/true', ['true'])",
    "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "import os, importlib; importlib.reload(os)\nif os.system('true'): raise PermissionError",
    "import os; os.kill(os.getppid(), 0)",
    "import os; os.killpg(0, 0)",
    "import ctypes\nif ctypes.CDLL(None).ptrace(16, __import__('os').getppid(), 0, 0): raise PermissionError",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise PermissionError",
    "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, 0): raise PermissionError",
    "import ctypes\nif ctypes.CDLL(None).sethostname(b'x', 1): raise PermissionError",
    "import ctypes\nif ctypes.CDLL(None).syscall(425, 8, 0) < 0: raise PermissionError",
    "import ctypes\nif ctypes.CDLL(None).syscall(452, 0, b'.', 0, 0) < 0: raise PermissionError",
    "open('big', 'wb').write(bytes(2 * 2**20)); import os\nif os.path.getsize('big') <= 2**20: raise OSError",
])
def test_blocked(code, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    mode = secret.stat().st_mode
    result = run_code(f"OUTSIDE = {str(tmp_path)!r}\n{code}")
    assert not result.ok and not result.timed_out
    assert re.search("PermissionError|OSError|URLError|error|not allowed", result.error), result
    assert [p.name for p in tmp_path.iterdir()] == ["secret"] and secret.read_text() == "secret"
    assert secret.stat().st_mode == mode


@kernel
def test_secrets_do_not_reach_the_code(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    result = run_code("import os; print(dict(os.environ))")
    assert result.ok and "hush" not in result.output


@kernel
def test_no_connection_reaches_a_listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        assert not run_code(f"import socket; socket.create_connection(('127.0.0.1', {port}))").ok
        with pytest.raises(TimeoutError):
            listener.accept()


@kernel
@pytest.mark.parametrize("code", [
    "import os; os.abort()",
    "import ctypes; ctypes.string_at(0)",
    "import os; os.kill(os.getpid(), 9)",
    "def f(): f()\nf()",
])
def test_crashes_fail_and_the_next_runs(code):
    result = run_code(code)
    assert not result.ok and result.error
    assert run_code("print(1)").output == "1\n"


@kernel
@pytest.mark.parametrize("code", [
    "import os; os.getcwd(); os.listdir('.')",
    "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('y')",
    "import pathlib; p = pathlib.Path('x'); p.write_text('y'); p.unlink()",
    "import threading\nts = [threading.Thread(target=print) for _ in range(200)]\nfor t in ts: t.start(); t.join()",
    "for i in range(1000): open(f'f{i}', 'w').close()",
    "import heapq, string, operator, fractions, collections, itertools, math, random, re, hashlib",
    "import json, datetime, decimal, functools, typing, dataclasses, statistics, bisect, copy, textwrap",
    "import hashlib; assert hashlib.md5(b'x').hexdigest()",
    "import os; assert len(os.urandom(8)) == 8",
    "import time; time.sleep(0.01); time.localtime()",
])
def test_honest_code_passes(code):
    result = run_code(code)
    assert result.ok, result.error


@kernel
@pytest.mark.parametrize("code", [
    "import os\nfor _ in range(1100):\n os.mkdir('d'); os.chdir('d')",
    "import os\nfor i in range(50): os.mkdir(f'd{i}'); open(f'd{i}/f', 'w').close()\nos.mkdir('shut', 0)",
    "import os\nos.makedirs('a/b/c'); os.umask(0o777); os.mkdir('a/b/c/locked'); os.mkdir('moved-1-x')",
])
def test_scratch_is_removed(code, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_code(code)
    assert list(tmp_path.iterdir()) == []


def test_remove_tree_keeps_what_links_point_at(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").write_text("x")
    (tmp_path / "root" / "inner").mkdir(parents=True)
    for place in ("root/link", "root/inner/link"):
        (tmp_path / place).symlink_to(tmp_path / "keep")
    remove_tree(tmp_path / "root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep"]
    assert (tmp_path / "keep" / "file").exists()


# ----- refusal, not a silent downgrade

def test_refuses_without_sandbox(monkeypatch):
    monkeypatch.setattr(execution, "_probe", lambda: "needs Linux on x86-64, this is Plan 9 on vax")
    assert sandbox_level() == "none"
    with pytest.raises(SandboxUnavailable, match="unsafe=True"):
        run_code("print(1)")
    with pytest.raises(SandboxUnavailable, match="Plan 9"):
        run_tests("x = 1", "assert x")
    result = run_code("print(1)", unsafe=True)
    assert (result.ok, result.output, result.level) == (True, "1\n", "none")


def test_unsafe_still_kills_children(monkeypatch):
    monkeypatch.setattr(execution, "_probe", lambda: "no sandbox here")
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
    began = time.monotonic()
    result = run_code(code, timeout=1, unsafe=True)
    assert not result.ok and time.monotonic() - began < 5  # the grandchild holds our pipe: killed with it


@kernel
def test_broken_lock_refuses(monkeypatch):
    monkeypatch.setattr(execution, "child_source", lambda: "raise OSError(38, 'no such system call')")
    with pytest.raises(SandboxUnavailable, match="no such system call"):
        run_code("print(1)")


def test_no_process_to_be_had(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(execution, "_probe", lambda: "")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(SandboxUnavailable, match="Too many open files"):
        run_code("print(1)")


def test_table_agrees_with_the_kernel_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    for calls in DENIED.values():
        for name, number in calls.items():
            assert numbers[name] == str(number)


# ----- replies

@pytest.mark.parametrize("reply, code", [
    ("x = 1", "x = 1"),
    ("```python\nx = 1\n```", "x = 1\n"),
    ("So:\n\n```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 1\n"),
    ("```python\nx = 1", "x = 1"),
    ("```py\r\nx = 1\r\n```\r\n", "x = 1\n"),
    ("", ""),
    ("```python\n```", ""),
    ("use `x = 1` here", "use `x = 1` here"),
])
def test_extract_code(reply, code):
    assert extract_code(reply) == code


@kernel
def test_many_at_once_keep_their_order():
    jobs = [{"code": f"def f(): return {i}", "tests": "assert f() % 2 == 0", "entry_point": "f"}
            for i in range(64)]
    assert [r.ok for r in run_many(jobs)] == [i % 2 == 0 for i in range(64)]
