"""The rules of the house, as functions from a checkout to a list of problems.

`python tools/nb.py check` prints them all, tests/test_house.py holds them and breaks each one to
see that it can fail.  Nothing here runs a notebook or changes a file of the checkout.
"""
import ast
import functools
import graphlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import jupytext
import nbformat
import yaml

import nb as workshop

HAND_WRITTEN = {"__init__.py", "ui"}  # all of the package that is not generated
MACHINE_PATH = re.compile(r"(?<![\w./~-])(?:/(?:home|root|work|tmp|Users|private|var/folders)/"
                          r"|[A-Z]:\\Users\\)[^\s'\"]*")


def check(root: Path) -> list[str]:
    "All problems of the checkout at `root`."
    return [problem for rule in RULES for problem in rule(root)]


def names(root: Path) -> list[str]:
    return sorted((path.stem for path in (root / "nbs").glob("*.ipynb")),
                  key=workshop.reading_order)


def read(root: Path, name: str):
    return parse((root / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=64)
def parse(text: str):
    "A notebook, to be looked at and not changed; the rules share it."
    return nbformat.v4.reads(text)


# ---------------------------------------------------------------- the package mirrors the notebooks

def check_package(root: Path) -> list[str]:
    "Modules that are stale, edited by hand or orphaned: export into a copy and compare every file."
    def files(package: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in package.glob("*.py")}

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / root.name
        (copy / "nbs").mkdir(parents=True)
        settings = [root / "settings.ini", root / "pyproject.toml"]
        for path in [*(root / "nbs").glob("*.ipynb"), *settings]:
            shutil.copy(path, copy / path.relative_to(root))
        (copy / "nanochat_nb").mkdir()
        shutil.copy(root / "nanochat_nb/__init__.py", copy / "nanochat_nb/__init__.py")
        workshop.export(copy)
        expected, found = files(copy / "nanochat_nb"), files(root / "nanochat_nb")
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"nanochat_nb/{name} is missing: run `python tools/nb.py sync`")
        elif name not in expected:
            problems.append(f"nanochat_nb/{name} is an orphan: no notebook exports it")
        elif expected[name] != found[name]:
            problems.append(f"nanochat_nb/{name} differs from its notebook (stale or edited by "
                            "hand): run `python tools/nb.py sync`")
    strangers = {path.name for path in (root / "nanochat_nb").iterdir()
                 if path.suffix != ".py"} - HAND_WRITTEN - {"__pycache__"}
    return problems + [f"nanochat_nb/{name} does not belong there" for name in sorted(strangers)]


def check_names(root: Path) -> list[str]:
    "Notebooks whose module does not have their name."
    problems = []
    for name in names(root):
        code = "\n".join(cell.source for cell in read(root, name).cells if cell.cell_type == "code")
        module = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.MULTILINE)
        wanted = re.fullmatch(r"\d\d([a-z]\d?)?_([a-z]\w*)", name)
        if not wanted:
            problems.append(f"nbs/{name}.ipynb: wants a name like 07b_tasks or 02a1_grammar")
        elif not module or module[1] != wanted[2]:
            problems.append(f"nbs/{name}.ipynb: wants `#| default_exp {wanted[2]}`")
    return problems


def check_text(root: Path) -> list[str]:
    "Text pairs, where there are any, with edits that have not reached the notebook."
    return [f"nbs/{name}.py has edits that the notebook lacks: run `python tools/nb.py sync {name}`"
            for name in names(root)
            if workshop.newer(text := root / "nbs" / f"{name}.py", text.with_suffix(".ipynb"))
            and workshop.sources(jupytext.read(text)) != workshop.sources(read(root, name))]


def check_layout(root: Path) -> list[str]:
    "Files that make nbdev or Quarto do something else than meant."
    return [f"{path} must not exist: {reason}" for path, reason in {
        "nbs/_quarto.yml": "a site inside the site; the one at the root is ours",
        "nbs/index.ipynb": "nbdev would render it over README.md",
        "index.ipynb": "nbdev would render it over README.md",
    }.items() if (root / path).exists()]


def check_shape(root: Path) -> list[str]:
    "Pages without the opening block or the closing sections that every page has."
    problems = []
    for name in names(root):
        cells = [cell.source for cell in read(root, name).cells if cell.cell_type == "markdown"]
        opening, page = cells[0] if cells else "", "\n".join(cells)
        parts = [r"\A# \d([a-z]\d?)? · ", r"^> ", r"\*\*You will\*\*", r"\*\*You need\*\*",
                 r"\*\*Time\*\*", r"\*\*Where we are\*\*"]
        missing = [part for part in parts if not re.search(part, opening, re.MULTILINE)]
        missing += [part for part in (r"^## Summary", r"^## Exercises", r"^## Further reading")
                    if not re.search(part, page, re.MULTILINE)]
        if missing:
            problems.append(f"nbs/{name}.ipynb lacks {', '.join(missing)}")
    return problems


# ---------------------------------------------------------------- stored outputs

def check_outputs(root: Path) -> list[str]:
    "Outputs that are missing, older than the code, errors, or that name a path of some machine."
    problems = []
    for name in names(root):
        notebook = read(root, name)
        stamp = notebook.metadata.get("stamp", {})
        if stamp.get("code") != workshop.code_hash(notebook):
            age = "older than its code" if stamp else "missing"
            problems.append(f"nbs/{name}.ipynb: outputs are {age}: `python tools/nb.py run {name}`")
        for cell in notebook.cells:
            where = f"nbs/{name}.ipynb #{cell.id}"
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    problems.append(f"{where}: the stored output is an error")
                data = output.get("data", {"text": output.get("text", "")})
                text = "\n".join(str(value) for kind, value in data.items() if "image/" not in kind)
                if path := MACHINE_PATH.search(text):
                    problems.append(f"{where}: the output names a path of a machine: {path[0]}")
    return problems


# ---------------------------------------------------------------- imports go down

def imported(source: str) -> set[str]:
    "Modules of the package that a cell imports, also inside its functions."
    found = set()
    source = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE)  # magics are not Python
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "nanochat_nb":
            found |= {f"nanochat_nb.{a.name}" for a in node.names if a.name != "__version__"}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[1] for name in found if name.startswith("nanochat_nb.")}


def may_import(importer: str, other: str) -> bool:
    """Whether notebook `importer` may import notebook `other`, given as `07`, `07b` or `02a1`.

    Lower chapters, and of its own chapter the companions, but never itself or a page above it:
    02a may import 02a1 and 02b, and 02a1 neither 02a nor 02.
    """
    if importer[:2] != other[:2]:
        return other[:2] < importer[:2]
    return not importer.startswith(other)


def check_imports(root: Path) -> list[str]:
    "Imports that do not go to a lower chapter, and companions that import each other."
    places = {name.split("_", 1)[1]: name.split("_", 1)[0] for name in names(root)}
    problems, graph = [], {}
    for name in names(root):
        for cell in read(root, name).cells:
            where = f"nbs/{name}.ipynb #{cell.id}"
            for module in sorted(imported(cell.source)) if cell.cell_type == "code" else []:
                graph.setdefault(name.split("_", 1)[1], set()).add(module)
                if module not in places:
                    problems.append(f"{where}: imports {module}, which no notebook exports")
                elif not may_import(name.split("_", 1)[0], places[module]):
                    problems.append(f"{where}: may not import {module} ({places[module]}): imports "
                                    "go only to lower chapters and own companions")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        problems.append(f"modules import each other: {' → '.join(reversed(error.args[1]))}")
    return problems


# ---------------------------------------------------------------- the site

def sidebar_pages(contents) -> list[str]:
    "The pages that a sidebar lists, in order: strings, `section:` and `href:` that are files."
    if isinstance(contents, str):
        return [contents] if re.search(r"\.(qmd|ipynb|md)$", contents) else []
    if isinstance(contents, dict):
        return [page for key in ("section", "href", "file", "contents")
                for page in sidebar_pages(contents.get(key) or [])]
    return [page for item in contents for page in sidebar_pages(item)]


def check_site(root: Path) -> list[str]:
    "Pages listed that do not exist, and pages that exist and are not listed."
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    listed = sidebar_pages(site["website"]["sidebar"]["contents"])
    pages = {path.relative_to(root).as_posix() for pattern in site["project"]["render"]
             for path in root.glob(pattern)}
    return [*(f"_quarto.yml lists {page}, which does not exist" for page in listed
              if not (root / page).exists()),
            *(f"_quarto.yml lists {page} twice" for page in sorted(set(listed))
              if listed.count(page) > 1),
            *(f"_quarto.yml does not list {page}" for page in sorted(pages - set(listed)))]


def site_filter(root: Path):
    "The function that turns a notebook into what Quarto gets to see."
    spec = importlib.util.spec_from_file_location("site_filter", root / "course/filter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.clean


def check_pages(root: Path) -> list[str]:
    "Cell options that Quarto could not read, figures without a description."
    problems, clean = [], site_filter(root)
    for name in names(root):
        path = root / "nbs" / f"{name}.ipynb"
        for cell in clean(json.loads(path.read_text(encoding="utf-8")))["cells"]:
            if cell["cell_type"] != "code":
                continue
            where = f"nbs/{name}.ipynb #{cell['id']}"
            lines = [line[2:] for line in cell["source"] if line.startswith("#|")]
            try:
                options = yaml.safe_load("".join(lines)) or {}
            except yaml.YAMLError:
                options = None
            if not isinstance(options, dict):
                problems.append(f"{where}: cell options are not YAML (quote the text): {lines}")
                continue
            figure = any(kind.startswith("image/") for output in cell["outputs"]
                         for kind in output.get("data", {}))
            if figure and not options.get("fig-alt"):
                problems.append(f"{where}: a figure without `#| fig-alt: \"what it shows\"`")
    return problems


def prose(root: Path) -> dict[Path, str]:
    "Everything written in Markdown, without code blocks and inline code."
    texts = {root / "nbs" / f"{name}.ipynb": "\n\n".join(
        cell.source for cell in read(root, name).cells if cell.cell_type == "markdown")
        for name in names(root)}
    for path in [*root.glob("*.md"), *root.glob("*.qmd"), *root.glob("course/**/*.qmd")]:
        texts[path] = path.read_text(encoding="utf-8")
    code = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
    return {path: code.sub("", text) for path, text in texts.items()}


def check_links(root: Path) -> list[str]:
    "Relative links and images that lead nowhere, images without a description."
    problems = []
    for path, text in prose(root).items():
        for mark, label, target in re.findall(r"(!?)\[([^\]]*)\]\(<?([^)\s>]+)[^)]*\)", text):
            where = path.relative_to(root)
            if mark and not label.strip():
                problems.append(f"{where}: the image {target} has no description")
            file = target.split("#")[0]
            if re.match(r"[a-z]+:", target) or not file:
                continue
            goal = Path(os.path.normpath(path.parent / file))
            text_pair = goal.parent == root / "nbs" and goal.suffix == ".py"  # not in a clone
            if not goal.exists() or text_pair or not goal.is_relative_to(root):
                problems.append(f"{where}: the link to {target} leads nowhere")
    return problems


RULES = [check_package, check_names, check_text, check_layout, check_shape, check_outputs,
         check_imports, check_site, check_pages, check_links]
