"""What a notebook of ours looks like to Quarto: standard input to standard output, as JSON.

nbdev's directives (`#| export`, `#| default_exp name`) are not options that Quarto knows, and
would land on the page.  Drops the cells that only steer nbdev, and every directive line that is
not `key: value`.
"""
import json
import re
import sys

STEERING = re.compile(r"^#\|\s*(default_exp|hide)\b", re.MULTILINE)
OPTION = re.compile(r"^#\|\s*[\w-]+\s*:\s")  # `fig-alt: "…"`: Quarto's own


def clean(notebook: dict) -> dict:
    "The notebook without nbdev's directives."
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])  # a list of lines, as in every notebook file
            if STEERING.search(source):
                continue
            lines = [line for line in source.splitlines(keepends=True)
                     if not line.startswith("#|") or OPTION.match(line)]
            if not "".join(lines).strip() and not cell["outputs"]:
                continue
            cell = {**cell, "source": lines}  # Quarto wants a list here too
        cells.append(cell)
    return {**notebook, "cells": cells}


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    json.dump(clean(json.load(sys.stdin)), sys.stdout)
