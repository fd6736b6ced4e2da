"""Shared by all tests: where things are, how to start a command of ours."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_module(module: str, *flags, env=None, timeout=600) -> subprocess.CompletedProcess:
    "`python -m nanochat_nb.MODULE FLAGS`, its output captured as text."
    command = [sys.executable, "-m", f"nanochat_nb.{module}", *map(str, flags)]
    return subprocess.run(command, env={**os.environ, **(env or {})}, text=True,
                          capture_output=True, timeout=timeout)


@pytest.fixture
def base_dir(tmp_path, monkeypatch) -> Path:
    "An empty NANOCHAT_BASE_DIR, for this process and those it starts."
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="module")
def one_thread():
    "The module's tests run in one thread, whatever the machine has."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of real text and tasks that NANOCHAT_TEST_DATA names; skips where there is none."
    path = os.environ.get("NANOCHAT_TEST_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("NANOCHAT_TEST_DATA does not name a folder")
    return Path(path)
