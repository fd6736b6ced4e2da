"""Every notebook runs top to bottom in a fresh kernel; nothing is stored."""
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import house
import pytest
from conftest import ROOT

TIMEOUT = 300  # seconds a notebook may take
WORKERS = min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory) -> dict[str, Future]:
    "The selected notebooks, started two at a time in reading order."
    selected = [item.callspec.params["name"] for item in request.session.items
                if getattr(item, "originalname", "") == "test_notebook"]
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))

    def run(name: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT / "tools"),
               "NANOCHAT_BASE_DIR": str(tmp_path_factory.mktemp("base"))}
        command = f"import nb; print(nb.run({name!r}, timeout={TIMEOUT}, store=False))"
        return subprocess.run([sys.executable, "-c", command], env=env, text=True,
                              capture_output=True, timeout=TIMEOUT + 60)

    with ThreadPoolExecutor(WORKERS) as pool:
        yield {name: pool.submit(run, name) for name in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", house.names(ROOT))
def test_notebook(runs, name):
    result = runs[name].result()
    assert result.returncode == 0, result.stderr[-4000:]
    assert float(result.stdout.split()[-1]) < TIMEOUT
