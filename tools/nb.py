"""Work on the notebooks as text: `python tools/nb.py sync|run|pull NAME…`.

    sync   nbs/NAME.py → nbs/NAME.ipynb (text wins; outputs and cell ids are kept), name the cells,
           export the package
    run    sync, then execute the notebook in a fresh kernel and store its outputs with a stamp
    pull   nbs/NAME.ipynb → nbs/NAME.py (notebook wins): the way in after a clone or a checkout

NAME is a notebook's file name without its ending; no NAME means all of them.
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
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def notebooks() -> list[str]:
    "Names of all notebooks, in reading order."
    return sorted({p.stem for p in NBS.glob("*.ipynb")} | {p.stem for p in NBS.glob("*.py")})


def slug(text: str) -> str:
    "Lower-case words joined by dashes, at most 40 characters: what a cell id may contain."
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "cell"


def defined_name(source: str) -> str:
    "The first function or class that a cell defines, or ''."
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with %magics
        return ""
    return next((node.name for node in tree.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))), "")


def name_cells(nb) -> None:
    "Give each cell a readable id: its section, and for exported code what it defines."
    section, seen = "top", {}
    for cell in nb.cells:
        heading = re.match(r"#+ (.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            section = slug(heading[1])
        name = slug(defined_name(cell.source)) if cell.source.startswith("#| export") else ""
        base = name if name and name != "cell" else section
        seen[base] = seen.get(base, 0) + 1
        cell["id"] = base if seen[base] == 1 else f"{base}-{seen[base]}"


def code_hash(nb) -> str:
    "A fingerprint of a notebook's code: outputs are fresh as long as it stays the same."
    code = "\n\0\n".join(c.source for c in nb.cells if c.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def write(nb, path: Path) -> None:
    "Write a notebook as nbdev does (sorted keys, one space), by rename so that no reader sees half."
    from execnb.nbio import dict2nb, write_nb  # noqa: F401  (the format that nbdev_clean writes)
    temporary = path.with_suffix(".tmp")
    write_nb(dict2nb(nb), temporary)
    temporary.rename(path)


def sync(names: list[str]) -> None:
    "Text → notebook, named cells, exported package."
    for name in names:
        text, notebook = NBS / f"{name}.py", NBS / f"{name}.ipynb"
        if not text.exists():
            continue
        new = jupytext.read(text)
        old = nbformat.read(notebook, 4) if notebook.exists() else None
        if old is not None:
            outputs = {}
            for cell in old.cells:
                if cell.cell_type == "code":
                    outputs.setdefault(cell.source, []).append(cell.outputs)
            for cell in new.cells:
                if cell.cell_type == "code" and outputs.get(cell.source):
                    cell.outputs = outputs[cell.source].pop(0)
        new.metadata = old.metadata if old is not None else nbformat.from_dict({"kernelspec": {
            "display_name": "python3", "language": "python", "name": "python3"}})
        name_cells(new)
        new.nbformat, new.nbformat_minor = 4, 5
        write(new, notebook)
    export()


def export() -> None:
    "nbdev_export, one at a time: two exports at once would write the same index file."
    with open(NBS / ".export.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-c", "from nbdev.export import nb_export; "
                        "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                       cwd=ROOT, check=True)


class Client(NotebookClient):
    "Executes every code cell but those marked `#| eval: false`."

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def stamp(nb) -> dict:
    "What a reader needs to know about a notebook's stored outputs."
    import torch
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor())
    return {"code": code_hash(nb), "date": datetime.date.today().isoformat(),
            "hardware": f"{os.cpu_count()} × {cpu}", "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0]}


def run(name: str, timeout: int, store: bool = True) -> None:
    "Execute a notebook in a fresh kernel that starts in nbs/; store its outputs and a stamp."
    path = NBS / f"{name}.ipynb"
    nb = nbformat.read(path, 4)
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would be stored as widgets
    client = Client(nb, timeout=timeout, resources={"metadata": {"path": str(NBS)}},
                    extra_arguments=["--KernelManager.transport=ipc"])
    client.execute()
    if not store:
        return
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                output.pop("metadata", None)
                if output.output_type == "execute_result":
                    output["execution_count"] = None
                if output.output_type in ("execute_result", "display_data"):
                    output["metadata"] = {}
    nb.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "stamp": stamp(nb)})
    write(nb, path)


def pull(names: list[str]) -> None:
    "Notebook → text."
    for name in names:
        jupytext.write(nbformat.read(NBS / f"{name}.ipynb", 4), NBS / f"{name}.py", fmt="py:percent")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["sync", "run", "pull"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    args = parser.parse_args()
    names = [Path(n).stem for n in args.names] or notebooks()
    if unknown := sorted(set(names) - set(notebooks())):
        parser.error(f"no notebook named {', '.join(unknown)} in {NBS}")
    if args.command == "pull":
        pull(names)
        return 0
    sync(names)
    if args.command == "run":
        for name in names:
            try:
                run(name, args.timeout)
            except CellExecutionError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            print(f"{name}: ran, outputs stored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
