"""The checkout keeps the rules of the house, and each rule notices when it is broken."""
import copy
import importlib.util
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
ENTRY_POINTS = [module for module in MODULES
                if "__main__" in (ROOT / f"nanochat_nb/{module}.py").read_text(encoding="utf-8")]


# ---------------------------------------------------------------- the rules hold

@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert rule(ROOT) == []


def test_every_room_is_there():
    "The map in the package's docstring names exactly the modules there are, in reading order."
    import nanochat_nb
    assert re.findall(r"^  [ *] (\w+) {2,}", nanochat_nb.__doc__, re.M) == MODULES


def test_ruff():
    subprocess.run([sys.executable, "-m", "ruff", "check", "tools", "tests", "nbs", "course"],
                   cwd=ROOT, check=True)


def test_nbdev_clean_changes_nothing(checkout):
    "What tools/nb.py stores, stamp included, is what nbdev_clean leaves."
    before = {path.name: path.read_bytes() for path in (checkout / "nbs").glob("*.ipynb")}
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
                   cwd=checkout, check=True)
    changed = [name for name, data in before.items() if (checkout / "nbs" / name).read_bytes() != data]
    assert changed == []


# ---------------------------------------------------------------- each rule can fail

@pytest.fixture
def checkout(tmp_path) -> Path:
    "A copy of what the rules look at, to be broken; without text pairs, like a fresh clone."
    copied = tmp_path / "nanochat_nb"
    ignore = shutil.ignore_patterns("*.py", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "nbs", copied / "nbs", ignore=ignore)
    for folder in ("nanochat_nb", "course", "tools"):
        shutil.copytree(ROOT / folder, copied / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.*"), ROOT / "LICENSE"]:
        if file.is_file():
            shutil.copy(file, copied / file.name)
    return copied


def new_problems(rule, checkout) -> list[str]:
    "What a rule says of the broken copy and does not say of the checkout."
    known = set(rule(ROOT))
    return [problem for problem in rule(checkout) if problem not in known]


def edit(checkout: Path, change, name="00_common") -> None:
    "Change a notebook of the copy in place."
    path = checkout / "nbs" / f"{name}.ipynb"
    notebook = nbformat.read(path, 4)
    change(notebook.cells)
    nbformat.write(notebook, path)


def code(source: str, outputs=(), cell_id="added"):
    cell = nbformat.v4.new_code_cell(source, outputs=list(outputs))
    cell["id"] = cell_id
    return cell


def shown(**data):
    return nbformat.v4.new_output("display_data", data={kind.replace("_", "/"): value
                                                        for kind, value in data.items()})


def test_stale_module(checkout):
    edit(checkout, lambda cells: cells.append(code("#| export\ndef added(): return 1")))
    assert any("common.py differs" in problem for problem in new_problems(house.check_package, checkout))


def test_module_edited_by_hand(checkout):
    path = checkout / "nanochat_nb/common.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert any("common.py differs" in problem for problem in new_problems(house.check_package, checkout))


def test_orphaned_module(checkout):
    (checkout / "nanochat_nb/orphan.py").write_text("", encoding="utf-8")
    (checkout / "nanochat_nb/stray.txt").write_text("", encoding="utf-8")
    (checkout / "nanochat_nb/common.py").unlink()
    problems = "\n".join(new_problems(house.check_package, checkout))
    assert "orphan.py is an orphan" in problems
    assert "stray.txt does not belong" in problems
    assert "common.py is missing" in problems


def test_module_of_another_name(checkout):
    (checkout / "nbs/00_common.ipynb").rename(checkout / "nbs/00_commons.ipynb")
    assert new_problems(house.check_names, checkout)


def test_text_with_edits(checkout):
    text = checkout / "nbs/00_common.py"
    text.write_text("# %%\n1 + 1\n", encoding="utf-8")
    assert new_problems(house.check_text, checkout)
    os.utime(text, (1, 1))  # older than the notebook: the notebook is the source
    assert not new_problems(house.check_text, checkout)


@pytest.mark.parametrize("path", ["nbs/_quarto.yml", "nbs/index.ipynb", "index.ipynb"])
def test_file_that_must_not_exist(checkout, path):
    (checkout / path).write_text("", encoding="utf-8")
    assert any(path in problem for problem in new_problems(house.check_layout, checkout))


def test_outputs_older_than_the_code(checkout):
    edit(checkout, lambda cells: cells[-2 if cells[-1].cell_type != "code" else -1].update(source="changed")
         if any(cell.cell_type == "code" for cell in cells[-2:]) else cells.append(code("changed")))
    assert any("older than its code" in p for p in new_problems(house.check_outputs, checkout))


def test_outputs_of_edited_prose_stay_fresh(checkout):
    edit(checkout, lambda cells: cells[0].update(source=cells[0].source + " More."))
    assert not new_problems(house.check_outputs, checkout)


@pytest.mark.parametrize("text", ["/home/ada/x.txt", "in '/tmp/tmp1234/a'", "C:\\Users\\ada\\x", "(/root/.cache)"])
def test_path_of_a_machine_in_an_output(checkout, text):
    edit(checkout, lambda cells: cells.append(code("1", [shown(text_plain=text)])))
    assert any("path of a machine" in problem for problem in new_problems(house.check_outputs, checkout))


@pytest.mark.parametrize("text", ["https://example.org/home/x", "tokens/tmp/x", "~/work/x", "1/home"])
def test_no_path_of_a_machine(checkout, text):
    edit(checkout, lambda cells: cells.append(code("1", [shown(text_plain=text)])))
    assert not any("path of a machine" in problem for problem in new_problems(house.check_outputs, checkout))


def test_error_as_stored_output(checkout):
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=["/home/ada"])
    edit(checkout, lambda cells: cells.append(code("1", [error])))
    assert any("is an error" in problem for problem in new_problems(house.check_outputs, checkout))


@pytest.mark.parametrize("importer, other, allowed", [
    ("05", "03", True), ("05", "03a", True), ("05", "05a", True), ("05b", "05a", True), ("07b", "00", True),
    ("05", "06", False), ("05", "06a", False), ("05a", "05", False), ("05a", "05b", False), ("05", "05", False)])
def test_who_may_import_whom(importer, other, allowed):
    assert house.may_import(importer, other) == allowed


@pytest.mark.parametrize("source", [
    "from nanochat_nb.gpt import GPT", "import nanochat_nb.gpt", "from nanochat_nb import gpt as g",
    "%time 1\ndef f():\n    from nanochat_nb.gpt import GPT"])
def test_import_of_a_higher_chapter(checkout, source):
    edit(checkout, lambda cells: cells.append(code(source)))
    assert any("may not import gpt" in problem for problem in new_problems(house.check_imports, checkout))


def test_page_not_listed_and_not_there(checkout):
    (checkout / "nbs/00_common.ipynb").rename(checkout / "nbs/00_other.ipynb")
    problems = "\n".join(new_problems(house.check_site, checkout))
    assert "lists nbs/00_common.ipynb, which does not exist" in problems
    assert "does not list nbs/00_other.ipynb" in problems


@pytest.mark.parametrize("source, complaint", [
    ("plot()", "without `#| fig-alt"), ('#| fig-alt: ""\nplot()', "without `#| fig-alt"),
    ("#| fig-alt: loss: falling\nplot()", "are not YAML"), ('#| fig-alt: "loss: falling"\nplot()', "")])
def test_figure_needs_a_description(checkout, source, complaint):
    edit(checkout, lambda cells: cells.append(code(source, [shown(image_png="aGk=")])))
    problems = new_problems(house.check_pages, checkout)
    assert complaint in "\n".join(problems) if complaint else not problems


@pytest.mark.parametrize("text, complaint", [
    ("[x](03_missing.ipynb)", "leads nowhere"), ("![a figure](missing.png)", "leads nowhere"),
    ("![](../index.qmd)", "no description"), ("[x](03_gpt.py)", "leads nowhere"),
    ("[x](../../elsewhere.md)", "leads nowhere"), ("[x](03_gpt.ipynb#attention)", ""),
    ("[x](https://example.org/a.png)", ""), ("[x](#here)", ""), ("`d[i](j)`", "")])
def test_link_that_leads_nowhere(checkout, text, complaint):
    edit(checkout, lambda cells: cells[0].update(source=cells[0].source + f"\n\n{text}\n"))
    problems = new_problems(house.check_links, checkout)
    assert complaint in "\n".join(problems) if complaint else not problems


# ---------------------------------------------------------------- the workshop

def test_names_of_cells():
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# 3a · Rotary positions\n\n> One line."),
        code("#| default_exp x"), code("#| export\nimport os"),
        nbformat.v4.new_markdown_cell("## The angles"), code("#| export\nBASE = 1"),
        code("#| export\ndef apply_rotary(): ..."), code("apply_rotary()"), code("1"),
        code("#| export\nif __name__ == '__main__' and '__file__' in globals():\n    pass")])
    workshop.name_cells(notebook)
    assert [cell.id for cell in notebook.cells] == [
        "rotary-positions-text", "rotary-positions-demo", "imports", "the-angles-text", "the-angles",
        "apply_rotary", "the-angles-demo", "the-angles-demo-2", "command-line"]
    nbformat.validate(notebook)


def nb_command(checkout, *args):
    return subprocess.run([sys.executable, "tools/nb.py", *args], cwd=checkout, text=True, capture_output=True)


def test_text_and_notebook_round_trip(checkout):
    "pull, edit, sync: outputs of unchanged cells stay, the package follows, neither side loses edits."
    text, notebook = checkout / "nbs/00_common.py", checkout / "nbs/00_common.ipynb"
    before = notebook.read_bytes()
    assert nb_command(checkout, "pull", "00_common").returncode == 0
    assert nb_command(checkout, "sync", "00_common").returncode == 0
    assert notebook.read_bytes() == before

    text.write_text(text.read_text(encoding="utf-8") + "\n# %%\n#| export\nADDED = 1\n", encoding="utf-8")
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
    (checkout / "nbs/00_common.py").write_text(
        "# %% [markdown]\n# # T\n#\n# > t\n\n# %%\n#| default_exp common\n\n# %%\n6 * 7\n\n"
        "# %%\n#| eval: false\n1 / 0\n", encoding="utf-8")
    assert nb_command(checkout, "run", "--no_store", "00_common").returncode == 0
    assert house.check_outputs(checkout) != []
    assert nb_command(checkout, "run", "00_common").returncode == 0
    notebook = house.read(checkout, "00_common")
    assert [output.data["text/plain"] for cell in notebook.cells for output in cell.get("outputs", [])] == ["42"]
    assert not any("00_common" in problem for problem in house.check_outputs(checkout))

    (checkout / "nbs/00_common.py").write_text("# %%\n1 / 0\n", encoding="utf-8")
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
    spec = importlib.util.spec_from_file_location("filter", ROOT / "course/filter.py")
    assert spec is not None
    cells = [code("#| default_exp x"), code("#| hide\nsecret()"), code("#| export\n"),
             code("#| export\n#| fig-alt: \"a: b\"\nx = 1  #| export"), nbformat.v4.new_markdown_cell("#| export")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    out = subprocess.run([sys.executable, ROOT / "course/filter.py"], input=nbformat.writes(notebook),
                         text=True, capture_output=True, check=True).stdout
    assert [cell["source"] for cell in json.loads(out)["cells"]] == [
        ['#| fig-alt: "a: b"\n', "x = 1  #| export"], ["#| export"]]


# ---------------------------------------------------------------- importing does nothing

IMPORT_ALL = """
import contextlib, importlib, io, json, os, random, sys, traceback
modules, extras, base = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]

class Absent:  # a machine on which the extras are not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras and importing != "serving":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy, torch
def state():
    return [dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.cuda.is_initialized(), os.getcwd(),
            str(numpy.random.get_state())]

report = {}
for importing in sorted(modules, key=lambda name: name == "serving"):
    said, before, error = io.StringIO(), state(), ""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            importlib.import_module(f"nanochat_nb.{importing}")
        except BaseException:
            error = traceback.format_exc()
    files = [os.path.join(folder, file) for folder, _, names in os.walk(base) for file in names]
    slow = sorted({"matplotlib", "datasets", "transformers", "pandas", "IPython"} & set(sys.modules))
    report[importing] = {"error": error, "said": said.getvalue(), "files": files, "slow": slow,
                         "changed": [i for i, (a, b) in enumerate(zip(before, state())) if a != b]}
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def imports(tmp_path_factory) -> dict:
    "What importing each module did, in one process without extras, with an empty home."
    home = tmp_path_factory.mktemp("home")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env.update(HOME=str(home), NANOCHAT_BASE_DIR=str(home / "base"), PYTHONPATH=str(ROOT),
               PYTHONDONTWRITEBYTECODE="1")
    extras = ["starlette", "uvicorn", "ipywidgets", "markdown_it", "nh3", "transformers", "trackio", "wandb",
              "httpx", "openai", "playwright", "pytest", "hypothesis", "jupytext", "nbclient", "nbdev"]
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL, json.dumps(MODULES), json.dumps(extras), str(home)],
                            cwd=home, env=env, text=True, capture_output=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_importing_does_nothing(imports, module):
    assert imports[module] == {"error": "", "said": "", "files": [], "slow": [], "changed": []}


# ---------------------------------------------------------------- command lines

COMMAND_LINES = """
import contextlib, io, json, runpy, sys, warnings
warnings.simplefilter("ignore")
report = {}
for module in json.loads(sys.argv[1]):
    for flags in (["--help"], ["--no_such_flag"]):
        out, err, code = io.StringIO(), io.StringIO(), 0
        sys.argv = [module, *flags]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(f"nanochat_nb.{module}", run_name="__main__", alter_sys=True)
            except SystemExit as exit:
                code = exit.code
            except BaseException as error:
                code = repr(error)
        report[f"{module} {flags[0]}"] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def command_lines(tmp_path_factory) -> dict:
    "What each entry point answers to --help and to a flag it does not have (one process: torch loads once)."
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(home / "base"), "COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-c", COMMAND_LINES, json.dumps(ENTRY_POINTS)],
                            cwd=home, env=env, text=True, capture_output=True, check=True)
    assert not list(home.iterdir()), "asking for help wrote files"
    return json.loads(result.stdout)


def entry_function(module: str):
    "The function that a module hands to run_cli."
    source = (ROOT / f"nanochat_nb/{module}.py").read_text(encoding="utf-8")
    name = re.search(r"^    run_cli\((\w+)\)", source, re.M)[1]
    return getattr(__import__(f"nanochat_nb.{module}", fromlist=[name]), name)


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_lists_the_flags(command_lines, module):
    status, out, err = command_lines[f"{module} --help"]
    assert (status or 0) == 0, err
    for name, parameter in inspect.signature(entry_function(module)).parameters.items():
        assert parameter.default is not True, f"{name}=True would be shown as --no-{name}"
        assert re.search(rf"(--| ){name}\b", out), f"{name} is not in the help:\n{out}"


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_unknown_flag(command_lines, module):
    status, out, err = command_lines[f"{module} --no_such_flag"]
    assert status == 2
    assert "no_such_flag" in err.splitlines()[-1] and "Traceback" not in err


def test_command_line_in_a_process_of_its_own(base_dir):
    "What the two tests above assume: `python -m` behaves like runpy in a shared process."
    good = run_module("report", "--help")
    assert good.returncode == 0 and "--output" in good.stdout
    bad = run_module("report", "--no_such_flag")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr


def test_the_stages_of_the_design_are_commands():
    expected = {"dataset", "tokenizer", "pretraining", "evaluation", "finetuning", "chat_eval", "reinforcement",
                "terminal", "serving", "report", "scaling", "export"}
    assert expected <= set(ENTRY_POINTS)
