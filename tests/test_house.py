"""The checkout keeps the rules of the house, and each rule notices when it is broken."""
import copy
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import house
import nb as workshop
import nbformat
import pytest
import yaml
from conftest import ROOT, run_module

MODULES = [name.split("_", 1)[1] for name in house.names(ROOT)]
ENTRY_POINTS = [module for module in MODULES if (ROOT / f"nanochat_nb/{module}.py").exists()
                and "run_cli(" in (ROOT / f"nanochat_nb/{module}.py").read_text(encoding="utf-8")
                and module != "common"]


# ---------------------------------------------------------------- the rules hold

@functools.cache
def problems_here(rule) -> list[str]:
    return rule(ROOT)


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert problems_here(rule) == []


def test_the_map_is_right():
    "The package's docstring names exactly the modules there are, in reading order."
    import nanochat_nb
    assert re.findall(r"^  [ *] (\w+) {2,}", nanochat_nb.__doc__, re.MULTILINE) == MODULES


def test_ruff():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise",
                             "tools", "tests", "nbs", "course"], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_modules_import_what_they_use():
    "A name that a notebook's demo cell imports is missing in the module: its exported cells must import it."
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401,F821",
                             "--output-format", "concise", ROOT / "nanochat_nb"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- each rule can fail

@pytest.fixture
def checkout(tmp_path) -> Path:
    "A copy of what the rules look at, to be broken; without text pairs, like a fresh clone."
    copied = tmp_path / "nanochat_nb"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "_site", "build"))
    for text in (copied / "nbs").glob("*.py"):
        text.unlink()
    return copied


def complaints(rule, checkout: Path) -> str:
    "What a rule says of the broken copy that it does not say of the checkout."
    return "\n".join(line for line in rule(checkout) if line not in problems_here(rule))


def edit(checkout: Path, change, name="00_common") -> None:
    "Change the cells of a notebook of the copy."
    path = checkout / "nbs" / f"{name}.ipynb"
    notebook = nbformat.read(path, 4)
    change(notebook.cells)
    nbformat.write(notebook, path)


def code(source: str, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def shown(kind: str, value: str):
    return nbformat.v4.new_output("display_data", data={kind: value})


def test_stale_module(checkout):
    edit(checkout, lambda cells: cells.append(code("#| export\ndef added(): return 1")))
    assert "common.py differs" in complaints(house.check_package, checkout)


def test_module_edited_by_hand(checkout):
    path = checkout / "nanochat_nb/common.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert "common.py differs" in complaints(house.check_package, checkout)


def test_orphaned_and_missing_modules(checkout):
    (checkout / "nanochat_nb/orphan.py").write_text("", encoding="utf-8")
    (checkout / "nanochat_nb/stray.txt").write_text("", encoding="utf-8")
    (checkout / "nanochat_nb/common.py").unlink()
    said = complaints(house.check_package, checkout)
    assert "orphan.py is an orphan" in said
    assert "stray.txt does not belong" in said
    assert "common.py is missing" in said


def test_module_of_another_name(checkout):
    (checkout / "nbs/00_common.ipynb").rename(checkout / "nbs/00_commons.ipynb")
    assert "default_exp commons" in complaints(house.check_names, checkout)


def test_names_of_notebooks(checkout):
    "A lesson, its companion, and a companion's companion; nothing deeper."
    def place(name):
        path = checkout / f"nbs/{name}_common.ipynb"
        (checkout / "nbs/00_common.ipynb").rename(path)
        said = complaints(house.check_names, checkout)
        path.rename(checkout / "nbs/00_common.ipynb")
        return said
    assert not any(place(name) for name in ("00a", "00a1", "10"))
    assert all("wants a name" in place(name) for name in ("0", "00A", "001", "00a1b", "00a12"))


def test_reading_order():
    names = ["02_b", "02a_a", "02a1_c", "02a2_b", "02b_a", "03_a"]
    assert sorted(reversed(names), key=workshop.reading_order) == names


def test_text_with_edits(checkout):
    text = checkout / "nbs/00_common.py"
    text.write_text("# %%\n1 + 1\n", encoding="utf-8")
    assert "has edits" in complaints(house.check_text, checkout)
    os.utime(text, (1, 1))  # older than the notebook, which is then the source
    assert not complaints(house.check_text, checkout)


@pytest.mark.parametrize("path", ["nbs/_quarto.yml", "nbs/index.ipynb", "index.ipynb"])
def test_file_that_must_not_exist(checkout, path):
    (checkout / path).write_text("", encoding="utf-8")
    assert path in complaints(house.check_layout, checkout)


def test_page_without_its_parts(checkout):
    edit(checkout, lambda cells: cells[0].update(source="# 0 · Common ground"))
    assert "You will" in complaints(house.check_shape, checkout)


def test_outputs_older_than_the_code(checkout):
    edit(checkout, lambda cells: cells[0].update(source=cells[0].source + " More prose."))
    assert not complaints(house.check_outputs, checkout)
    edit(checkout, lambda cells: cells[2].update(source=cells[2].source + "\n1"))
    assert "older than its code" in complaints(house.check_outputs, checkout)


@pytest.mark.parametrize("text", [
    "/home/ada/x.txt", "in '/tmp/tmp1234/a'", "C:\\Users\\ada\\x", "(/Users/ada/.cache)"])
def test_path_of_a_machine_in_an_output(checkout, text):
    edit(checkout, lambda cells: cells.append(code("1", shown("text/plain", text))))
    assert "path of a machine" in complaints(house.check_outputs, checkout)


@pytest.mark.parametrize("text", [
    "https://example.org/home/x", "tokens/tmp/x", "~/tmp/x", "1/home"])
def test_no_path_of_a_machine(checkout, text):
    edit(checkout, lambda cells: cells.append(code("1", shown("text/plain", text))))
    assert "path of a machine" not in complaints(house.check_outputs, checkout)


def test_error_as_stored_output(checkout):
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    edit(checkout, lambda cells: cells.append(code("1", error)))
    assert "is an error" in complaints(house.check_outputs, checkout)


@pytest.mark.parametrize("importer, others, allowed", [
    ("05", ["00", "03", "03a", "05a", "05b"], True), ("05", ["05", "06", "06a"], False),
    ("05b", ["05a", "05c", "04", "03a"], True), ("05a", ["05", "05a", "06"], False),
    ("05a", ["05a1", "05b", "05b2", "04a1"], True), ("05a1", ["05", "05a", "05a1", "06"], False),
    ("05a2", ["05a1", "05b"], True), ("05", ["05a1"], True)])
def test_who_may_import_whom(importer, others, allowed):
    assert [house.may_import(importer, other) for other in others] == [allowed] * len(others)


@pytest.mark.parametrize("source", [
    "from nanochat_nb.gpt import GPT", "import nanochat_nb.gpt", "from nanochat_nb import gpt as g",
    "%time 1\ndef f():\n    from nanochat_nb.gpt import GPT"])
def test_import_of_a_higher_chapter(checkout, source):
    edit(checkout, lambda cells: cells.append(code(source)))
    assert "may not import gpt" in complaints(house.check_imports, checkout)


def test_modules_that_import_each_other(checkout):
    edit(checkout, lambda cells: cells.append(code("from nanochat_nb.attention import KVCache")))
    edit(checkout, lambda cells: cells.append(code("import nanochat_nb.common")), "03a_attention")
    assert "import each other" in complaints(house.check_imports, checkout)


def test_page_not_listed_and_page_not_there(checkout):
    (checkout / "nbs/00_common.ipynb").rename(checkout / "nbs/00_other.ipynb")
    said = complaints(house.check_site, checkout)
    assert "lists nbs/00_common.ipynb, which does not exist" in said
    assert "does not list nbs/00_other.ipynb" in said


@pytest.mark.parametrize("options, complaint", [
    ("", "without `#| fig-alt"), ('#| fig-alt: ""\n', "without `#| fig-alt"),
    ("#| fig-alt: loss: falling\n", "are not YAML"), ('#| fig-alt: "loss: falling"\n', "")])
def test_figure_needs_a_description(checkout, options, complaint):
    figure = code(f"{options}plot()", shown("image/png", "aGk="))
    edit(checkout, lambda cells: cells.append(figure))
    said = complaints(house.check_pages, checkout)
    assert complaint in said and bool(complaint) == bool(said)


@pytest.mark.parametrize("text, complaint", [
    ("[x](03_missing.ipynb)", "leads nowhere"), ("![a figure](missing.png)", "leads nowhere"),
    ("![](../index.qmd)", "no description"), ("[x](03_gpt.py)", "leads nowhere"),
    ("[x](../../elsewhere.md)", "leads nowhere"), ("[x](00_common.ipynb#ranks)", ""),
    ("[x](https://example.org/a.png)", ""), ("[x](#here)", ""), ("`d[i](j)`", "")])
def test_link_that_leads_nowhere(checkout, text, complaint):
    edit(checkout, lambda cells: cells[0].update(source=f"{cells[0].source}\n\n{text}\n"))
    said = complaints(house.check_links, checkout)
    assert complaint in said and bool(complaint) == bool(said)


# ---------------------------------------------------------------- the workshop

def test_names_of_cells():
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# 3a1 · Rotary positions\n\n> One line."),
        code("#| default_exp x"), code("#| export\nimport os"),
        nbformat.v4.new_markdown_cell("## The angles"), code("#| export\nBASE = 1"),
        code("#| export\ndef apply_rotary(): ..."), code("apply_rotary()"), code("1"),
        code("#| export\nif __name__ == '__main__' and '__file__' in globals():\n    pass")])
    workshop.name_cells(notebook)
    assert [cell.id for cell in notebook.cells] == [
        "rotary-positions-text", "rotary-positions-demo", "imports",
        "the-angles-text", "the-angles", "apply_rotary", "the-angles-demo", "the-angles-demo-2",
        "command-line"]
    nbformat.validate(notebook)


def nb_command(checkout, *args):
    return subprocess.run([sys.executable, "tools/nb.py", *args], cwd=checkout, text=True,
                          capture_output=True)


def test_text_and_notebook_round_trip(checkout):
    "pull, edit, sync: unchanged cells keep outputs, the package follows, neither side loses edits."
    text, notebook = checkout / "nbs/00_common.py", checkout / "nbs/00_common.ipynb"
    before = notebook.read_bytes()
    assert nb_command(checkout, "pull", "00_common").returncode == 0
    assert nb_command(checkout, "sync", "00_common").returncode == 0
    assert notebook.read_bytes() == before

    with open(text, "a", encoding="utf-8") as file:
        file.write("\n# %%\n#| export\nADDED = 1\n")
    assert "has edits" in nb_command(checkout, "pull", "00_common").stderr
    assert nb_command(checkout, "sync", "00_common").returncode == 0
    assert "ADDED = 1" in (checkout / "nanochat_nb/common.py").read_text(encoding="utf-8")
    outputs = [sum(len(cell.get("outputs", [])) for cell in nbformat.reads(data, 4).cells)
               for data in (before, notebook.read_bytes())]
    assert outputs[0] == outputs[1] > 0

    edit(checkout, lambda cells: cells.append(code("2")))  # as JupyterLab would
    assert "is newer than" in nb_command(checkout, "sync", "00_common").stderr


def test_syntax_error_is_not_exported(checkout):
    (checkout / "nbs/00_common.py").write_text("# %%\n#| export\ndef f(:\n", encoding="utf-8")
    before = (checkout / "nanochat_nb/common.py").read_bytes()
    result = nb_command(checkout, "sync", "00_common")
    assert result.returncode == 2 and "nbs/00_common.py, cell 0, line 2" in result.stderr
    assert (checkout / "nanochat_nb/common.py").read_bytes() == before


def test_run_stores_outputs_and_stamp(checkout):
    text, path = checkout / "nbs/00_common.py", checkout / "nbs/00_common.ipynb"
    text.write_text("# %% [markdown]\n# # T\n#\n# > t\n\n# %%\n#| default_exp common\n\n"
                    "# %%\n6 * 7\n\n# %%\n#| eval: false\n1 / 0\n", encoding="utf-8")
    assert nb_command(checkout, "run", "--no_store", "00_common").returncode == 0
    assert "00_common" in "\n".join(house.check_outputs(checkout))
    result = nb_command(checkout, "run", "00_common")
    assert (result.returncode, result.stderr) == (0, "")  # no warning of ipykernel's either
    outputs = [output for cell in house.read(checkout, "00_common").cells
               for output in cell.get("outputs", [])]
    assert [output.data["text/plain"] for output in outputs] == ["42"]
    assert "00_common" not in "\n".join(house.check_outputs(checkout))

    stored = path.read_bytes()  # nbdev_clean leaves what we stored, the stamp included
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
                   cwd=checkout, check=True)
    assert path.read_bytes() == stored

    text.write_text("# %%\n1 / 0\n", encoding="utf-8")
    result = nb_command(checkout, "run", "00_common")
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


# ---------------------------------------------------------------- the site

def test_quarto_configuration_is_valid(real_data):
    import jsonschema
    schema = json.loads((real_data / "quarto-schema/quarto-project.schema.slim.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(site)] == []
    broken = copy.deepcopy(site)
    broken["website"]["sidebars"] = broken["website"].pop("sidebar")
    assert list(validator.iter_errors(broken))


def test_site_filter():
    "As Quarto runs it: notebook in, notebook out, nbdev's directives gone, the rest untouched."
    cells = [code("#| default_exp x"), code("#| hide\nsecret()"), code("#| export\n"),
             code('#| export\n#| fig-alt: "a: b"\nx = 1  #| export'),
             nbformat.v4.new_markdown_cell("#| export — is prose")]
    out = subprocess.run([sys.executable, ROOT / "course/filter.py"], check=True, text=True,
                         input=nbformat.writes(nbformat.v4.new_notebook(cells=cells)),
                         capture_output=True, encoding="utf-8").stdout
    assert [cell["source"] for cell in json.loads(out)["cells"]] == [
        ['#| fig-alt: "a: b"\n', "x = 1  #| export"], ["#| export — is prose"]]


# ---------------------------------------------------------------- importing does nothing

IMPORT_ALL = """
import contextlib, importlib, io, json, os, random, sys, traceback
modules, extras, home = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]

class Absent:  # a machine without the extras; serving, imported last, may use them
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras and importing != "serving":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy, torch

def state():
    return {"environment": dict(os.environ), "folder": os.getcwd(), "random": random.getstate(),
            "numpy": str(numpy.random.get_state()), "torch": torch.get_rng_state().tolist(),
            "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
            "grad": torch.is_grad_enabled(), "cuda": torch.cuda.is_initialized(),
            "files": [path for path, _, names in os.walk(home) for _ in names]}

report = {}
for importing in sorted(modules, key=lambda name: name == "serving"):
    said, before, error = io.StringIO(), state(), ""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            importlib.import_module(f"nanochat_nb.{importing}")
        except BaseException:
            error = traceback.format_exc()
    after = state()
    report[importing] = {
        "error": error, "said": said.getvalue(),
        "changed": [key for key in before if before[key] != after[key]],
        "slow": sorted({"matplotlib", "datasets", "transformers", "pandas"} & set(sys.modules))}
print(json.dumps(report))
"""
EXTRAS = ["starlette", "uvicorn", "ipywidgets", "markdown_it", "nh3", "transformers", "trackio",
          "wandb", "httpx", "openai", "playwright", "pytest", "hypothesis", "jupytext", "nbclient",
          "nbdev"]


@pytest.fixture(scope="session")
def imports(tmp_path_factory) -> dict:
    "What importing each module did, in one process without extras and with an empty home."
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "HOME": str(home), "NANOCHAT_BASE_DIR": str(home / "base"),
           "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL, json.dumps(MODULES),
                             json.dumps(EXTRAS), str(home)],
                            cwd=home, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_importing_does_nothing(imports, module):
    assert imports[module] == {"error": "", "said": "", "changed": [], "slow": []}


# ---------------------------------------------------------------- command lines

COMMAND_LINES = """
import contextlib, io, json, runpy, sys, warnings
warnings.simplefilter("ignore")  # runpy: the module is already imported
report = {}
for module in json.loads(sys.argv[1]):
    for flag in ("--help", "--no_such_flag"):
        out, err, code = io.StringIO(), io.StringIO(), 0
        sys.argv = [module, flag]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(f"nanochat_nb.{module}", run_name="__main__", alter_sys=True)
            except SystemExit as exit:
                code = exit.code or 0
            except BaseException as error:
                code = repr(error)
        report[f"{module} {flag}"] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def command_lines(tmp_path_factory) -> dict:
    "What each command answers to --help and to an unknown flag; one process, torch loads once."
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(home / "base"), "COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-c", COMMAND_LINES, json.dumps(ENTRY_POINTS)],
                            cwd=home, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert not list(home.iterdir()), "asking for help wrote files"
    return json.loads(result.stdout)


def entry_function(module: str):
    "The function that a module hands to run_cli."
    source = (ROOT / f"nanochat_nb/{module}.py").read_text(encoding="utf-8")
    name = re.search(r"^    run_cli\((\w+)\)", source, re.MULTILINE)[1]
    return getattr(importlib.import_module(f"nanochat_nb.{module}"), name)


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_lists_the_flags(command_lines, module):
    status, out, err = command_lines[f"{module} --help"]
    assert status == 0, err
    for name, parameter in inspect.signature(entry_function(module)).parameters.items():
        assert parameter.default is not True, f"{name}=True would be shown as --no-{name}"
        assert re.search(rf"(--|\s){name}\b", out), f"{name} is not in the help:\n{out}"


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_unknown_flag(command_lines, module):
    status, _, err = command_lines[f"{module} --no_such_flag"]
    assert status == 2, err
    assert re.search(r"error: .*(no_such_flag|are required)", err.splitlines()[-1]), err
    assert "Traceback" not in err


def test_command_line_in_a_process_of_its_own(base_dir):
    "What the two tests above assume: `python -m` behaves like runpy in a shared process."
    good = run_module("report", "--help")
    assert good.returncode == 0 and "--output" in good.stdout
    bad = run_module("report", "--no_such_flag")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr


def test_the_commands_of_the_design_are_there():
    assert set(ENTRY_POINTS) >= {
        "dataset", "tokenizer", "pretraining", "evaluation", "finetuning", "chat_eval",
        "reinforcement", "terminal", "serving", "report", "scaling", "export"}
