"""Work on the notebooks as text: `python tools/nb.py sync|run|pull|check NAME…`.

    sync   nbs/NAME.py → nbs/NAME.ipynb: name the cells, keep the outputs of unchanged cells,
           export the package
    run    sync, then execute the notebook in a fresh kernel and store its outputs with a stamp
           (--no_store: only execute)
    pull   nbs/NAME.ipynb → nbs/NAME.py: the way in after a clone or a checkout
    check  the rules of tools/house.py, one line for each that is broken

NAME is a notebook's file name without its ending; no NAME means all of them.  A notebook made
from text takes over the text's modification time, so whichever was edited later is newer; neither
`sync` nor `pull` overwrites the newer one.
"""
import argparse
import ast
import datetime
import fcntl
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from execnb.nbio import dict2nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
PLAIN_TEXT = {"jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "-all"}}


class Refused(Exception):
    "Something that would lose work or break the package; its message says what to do."


def notebooks() -> list[str]:
    "Names of all notebooks, in reading order."
    found = {p.stem for p in NBS.glob("*.ipynb")} | {p.stem for p in NBS.glob("*.py")}
    return sorted(found, key=reading_order)


def reading_order(name: str) -> tuple[str, str]:
    "A key that puts a page before its companions: 02_dataset, 02a_pocket, 02a1_grammar, 02b_…"
    place, _, module = name.partition("_")
    return place, module


def newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns > other.stat().st_mtime_ns


def sources(nb) -> list[tuple[str, str]]:
    "What a notebook says, without its outputs."
    return [(cell.cell_type, cell.source) for cell in nb.cells]


# ---------------------------------------------------------------- names of cells

def slug(text: str) -> str:
    "Lower-case words joined by dashes, at most 40 characters, without a leading chapter number."
    words = re.findall(r"[a-z0-9_]+", re.sub(r"^\d\w* · ", "", text).lower())
    return "-".join(words)[:40].strip("-") or "cell"


def defined_name(source: str) -> str:
    "What an exported cell is about: `imports`, `command-line`, the first name it defines, or ''."
    body = ast.parse(source).body
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        return "imports"
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return "command-line"
    return ""


def name_cells(nb) -> None:
    """Give each cell a readable id; in the package it heads what the cell exports.

    The first exported cell of a section has the section's name, later ones what they define
    (`#rotary-positions`, then `#apply_rotary`); other cells are `SECTION-text` and `SECTION-demo`.
    """
    section, seen = "top", set()
    for cell in nb.cells:
        heading = re.match(r"#+ (.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            section = slug(heading[1])
        if cell.cell_type != "code":
            name = f"{section}-text"
        elif not cell.source.startswith("#| export"):
            name = f"{section}-demo"
        else:
            defined = defined_name(cell.source)
            special = defined in ("imports", "command-line") or section in seen
            name = (defined if special else section) or section
        free = (name if n == 1 else f"{name}-{n}" for n in range(1, len(nb.cells) + 2))
        cell["id"] = next(candidate for candidate in free if candidate not in seen)
        seen.add(cell["id"])


# ---------------------------------------------------------------- text, notebook, package

def code_hash(nb) -> str:
    "A fingerprint of a notebook's code: outputs are fresh as long as it stays the same."
    code = "\n\0\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def write(nb, path: Path, modified_ns: int) -> None:
    "Write a notebook exactly as nbdev_clean leaves it, by rename so that no reader sees half."
    nb = dict2nb(nb)
    clean_nb(nb, allowed_metadata_keys=["stamp"], allowed_cell_metadata_keys=["tags"])
    temporary = path.with_suffix(".tmp")
    write_nb(nb, temporary)
    os.utime(temporary, ns=(modified_ns, modified_ns))
    temporary.rename(path)


def sync(names: list[str]) -> None:
    "Text → notebook, named cells, exported package."
    for name in names:
        text, notebook = NBS / f"{name}.py", NBS / f"{name}.ipynb"
        if not text.exists():
            continue  # after a clone there is no text until `pull` makes it
        modified, new = text.stat().st_mtime_ns, jupytext.read(text)
        for number, cell in enumerate(new.cells):
            if cell.cell_type == "code" and cell.source.startswith("#| export"):
                try:
                    ast.parse(cell.source)
                except SyntaxError as error:  # exported, it would break the package for all
                    raise Refused(f"nbs/{name}.py, cell {number}, line {error.lineno}: {error.msg}:"
                                  f" {(error.text or '').strip()}") from None
        old = nbformat.read(notebook, 4) if notebook.exists() else None
        outputs = {}
        if old is not None and newer(notebook, text) and sources(old) != sources(new):
            raise Refused(f"nbs/{name}.ipynb is newer than nbs/{name}.py and differs from it: "
                          f"`pull {name}` takes the notebook, `touch nbs/{name}.py` and `sync` "
                          "take the text.")
        for cell in old.cells if old is not None else []:
            if cell.cell_type == "code":
                outputs.setdefault(cell.source, []).append(cell.outputs)
        for cell in new.cells:
            if outputs.get(cell.source):
                cell.outputs = outputs[cell.source].pop(0)
        new.metadata = old.metadata if old is not None else nbformat.from_dict(KERNEL)
        new.nbformat, new.nbformat_minor = 4, 5
        name_cells(new)
        write(new, notebook, modified)
    export(ROOT)


def export(root: Path) -> None:
    "nbdev_export, one at a time: two exports at once would write the same index file."
    lock = os.open(root / "nbs", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = "from nbdev.doclinks import nbdev_export; nbdev_export()"
        subprocess.run([sys.executable, "-c", command], cwd=root, check=True)
    finally:
        os.close(lock)


def pull(names: list[str]) -> None:
    "Notebook → text."
    for name in names:
        text, notebook = NBS / f"{name}.py", NBS / f"{name}.ipynb"
        modified, nb = notebook.stat().st_mtime_ns, nbformat.read(notebook, 4)
        if newer(text, notebook) and sources(jupytext.read(text)) != sources(nb):
            raise Refused(f"nbs/{name}.py has edits that nbs/{name}.ipynb lacks: `sync {name}` "
                          f"keeps them, deleting nbs/{name}.py drops them.")
        nb.metadata = nbformat.from_dict(PLAIN_TEXT)
        jupytext.write(nb, text, fmt="py:percent")
        os.utime(text, ns=(modified, modified))


# ---------------------------------------------------------------- running

NOT_RUN = re.compile(r"^#\|\s*eval:\s*false", re.MULTILINE)


class Client(NotebookClient):
    "Executes every code cell but those marked `#| eval: false`."

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type == "code" and NOT_RUN.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def hardware() -> str:
    "The processors, and the GPU if torch sees one."
    import torch
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = model[1] if model else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} × {cpu}{gpu}"


def run(name: str, timeout: int = 600, store: bool = True) -> float:
    "Execute a notebook in a fresh kernel; store outputs and stamp; return the seconds it took."
    path = NBS / f"{name}.ipynb"
    modified, nb, started = path.stat().st_mtime_ns, nbformat.read(path, 4), time.time()
    with tempfile.TemporaryDirectory(prefix="nb-") as sockets:
        # local sockets: over TCP ipykernel warns, and the warning would be stored
        config = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        Client(nb, timeout=timeout, config=config, store_widget_state=False, coalesce_streams=True,
               resources={"metadata": {"path": str(NBS)}}).execute(
                   env={**os.environ, "TQDM_DISABLE": "1"})  # bars would be stored as widgets
    seconds = round(time.time() - started, 1)
    if store:
        import torch
        for cell in nb.cells:
            cell.metadata = nbformat.from_dict({})
        nb.metadata = nbformat.from_dict({**KERNEL, "stamp": {
            "code": code_hash(nb), "date": datetime.date.today().isoformat(),
            "hardware": hardware(), "python": platform.python_version(), "seconds": seconds,
            "torch": torch.__version__.split("+")[0]}})
        write(nb, path, modified)  # the code's time: a text edited meanwhile stays newer
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["sync", "run", "pull", "check"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    parser.add_argument("--no_store", action="store_true", help="run: leave the notebook as it is")
    args = parser.parse_intermixed_args()
    names = [Path(name).stem for name in args.names] or notebooks()
    if unknown := sorted(set(names) - set(notebooks())):
        parser.error(f"no notebook named {', '.join(unknown)} in nbs/")
    try:
        if args.command == "check":
            import house
            problems = house.check(ROOT)
            print("\n".join(problems) or "nothing to mend")
            return bool(problems)
        if args.command == "pull":
            pull(names)
            return 0
        sync(names)
        for name in names if args.command == "run" else []:
            seconds = run(name, args.timeout, store=not args.no_store)
            print(f"{name}: ran in {seconds} s{'' if args.no_store else ', outputs stored'}")
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
