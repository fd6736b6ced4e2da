"The report card: complete, partial, empty and hostile runs."
import json
import re

import pytest
from conftest import run_module

from nanochat_nb.common import UserError, metric, write_report_section
from nanochat_nb.report import (collect_metrics, defuse, escape_cell, make_report, read_sections,
                                render_report, show_seconds, stage_seconds, summary_table)

HOSTILE = "x|y`z`\n<script>alert(1)</script>[a](javascript:1)![](https://evil/?q=1) **b** _c_ <img src=x onerror=1>"


def a_whole_run():
    "Sections as eight stages leave them."
    write_report_section("tokenizer", 1, {"vocab_size": 4096}, {"train_seconds": 2.5})
    write_report_section("dataset", 2, {"source": "pocket"})
    write_report_section("base-training", 3, {"depth": 4}, {"seconds": 200, "peak_memory_gb": 1.5},
                         {"BASE": {"bits per byte": metric(1.1, 40960, float("nan"))}}, "Samples:\n\n    'The sky is'")
    write_report_section("base-evaluation", 4, {}, {"seconds": 30.0},
                         {"BASE": {"CORE": metric(0.1, 3, 0.02), "copa": metric(0.5, 20)}})
    for order, (stage, column) in enumerate((("mid", "MID"), ("sft", "SFT"), ("rl", "RL"))):
        write_report_section(stage, 5 + 2 * order, {"lr": 0.02}, {"seconds": 10, "peak_memory_gb": 2.25})
        write_report_section(f"chat-evaluation-{stage}", 6 + 2 * order, {}, {"seconds": 5}, {
            column: {"ChatCORE": metric(0.2, 2, 0.03), "Pocket-Sums": metric(0.5, 100), "ARC-Easy": metric(0.3, 50)}})


def test_whole_run(base_dir, tmp_path):
    a_whole_run()
    path = make_report(str(tmp_path / "out" / "report.md"))
    page = path.read_text(encoding="utf-8")
    assert page == (base_dir / "report" / "report.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line)[1:-1] for line in page.split("## Summary")[1].split("A score")[0].splitlines()
            if line.startswith("|")]
    assert rows[0] == ["metric", "BASE", "MID", "SFT", "RL"]
    assert [row[0] for row in rows[2:]] == ["bits per byte", "CORE", "ARC-Easy", "Pocket-Sums", "ChatCORE"]
    assert rows[2][1:] == ["1.1000 (n=40,960)", "—", "—", "—"]
    assert rows[5][1:] == ["—"] + ["0.500 ± 0.050 (n=100)"] * 3
    assert "4 min 38 s" in page            # 2.5 + 200 + 30 + 3 × 15
    assert "**Peak memory** 2.25 GB" in page
    for part in ("| CPU |", "| memory |", "| GPU |", "| torch |", "| Python |", "| lines |", "| characters |",
                 "| files |", "sandbox level", "## chat-evaluation-rl", "'The sky is'", "| copa |"):
        assert part in page, part


def test_part_of_a_run(base_dir, tmp_path):
    write_report_section("sft", 7, {}, {})
    page = make_report(str(tmp_path / "r.md")).read_text(encoding="utf-8")
    assert "No stage has measured anything yet." in page and "**Total wall time** 0.0 s" in page
    assert "**Peak memory** —" in page


def test_nothing_to_report(base_dir, tmp_path):
    with pytest.raises(UserError, match="bash speedrun.sh"):
        make_report(str(tmp_path / "r.md"))
    assert not (tmp_path / "r.md").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "x", "metrics": [1]}', "\x00", '{"name": '])
def test_damaged_section(base_dir, content, tmp_path):
    (base_dir / "report").mkdir(parents=True)
    (base_dir / "report" / "05-mid.json").write_text(content)
    with pytest.raises(UserError, match="05-mid.json"):
        make_report(str(tmp_path / "r.md"))


def test_output_that_cannot_be_written(base_dir, tmp_path):
    write_report_section("sft", 7)
    with pytest.raises(UserError, match="is a folder"):
        make_report(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make_report(str(tmp_path / "file" / "r.md"))


def test_hostile_names_and_samples(base_dir, tmp_path):
    write_report_section("sft", 7, {HOSTILE: HOSTILE, "list": [HOSTILE]}, {HOSTILE: 1},
                         {HOSTILE: {HOSTILE: metric(0.5, 10)}, "SFT": {"task|`": metric(0.1, 0)}}, HOSTILE + "\n```\nopen")
    page = make_report(str(tmp_path / "r.md")).read_text(encoding="utf-8")
    assert not re.search(r"<(?!\u200b)[a-zA-Z/!]", page)
    assert "](" not in page.replace("\\](", "").replace("](https://", "](") or not re.search(r"(?<!\\)\]\(", page)
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):   # every row of a table has as many cells as its head
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table
    assert page.rstrip().endswith("```")                    # the open fence was closed


def test_reports_render_without_active_content(base_dir):
    markdown_it = pytest.importorskip("markdown_it")
    write_report_section("sft", 7, {"tag": HOSTILE}, {}, {"SFT": {HOSTILE: metric(0.5, 10)}}, HOSTILE)
    page = render_report(read_sections(), about={})
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(page)
    assert not re.search(r"<(script|img|a|iframe|svg)\b", html)


def test_escapes():
    assert escape_cell("device_batch_size") == "device_batch_size"
    assert escape_cell("_x_ y") == r"\_x\_ y"
    assert defuse("a < b, <|bos|>, `x[0]`") == "a < b, <|bos|>, `x[0]`"
    assert defuse("````\n```\n````\n") == "````\n```\n````\n"


def test_times():
    assert stage_seconds({"results": {"seconds": 3, "train_seconds": 2}}) == 3
    assert stage_seconds({"results": {"train_seconds": 2, "eval_seconds": 1}}) == 3
    assert stage_seconds({"results": {}}) is None
    assert show_seconds(3599.6) == "1 h 00 min"


def test_later_sections_win():
    sections = [{"metrics": {"SFT": {"x": metric(0.1, 10)}}}, {"metrics": {"SFT": {"x": metric(0.2, 10)}}}]
    assert collect_metrics(sections)["x"]["SFT"]["value"] == 0.2
    assert "0.200" in summary_table(sections)


def test_nan_is_a_dash(base_dir):
    write_report_section("sft", 7, metrics={"SFT": {"x": metric(float("nan"), 0)}})
    assert "| x | — | — | — | — |" in summary_table(read_sections())


def test_command_line(base_dir, tmp_path):
    done = run_module("report", "--output", tmp_path / "r.md")
    assert done.returncode == 2 and done.stderr.startswith("error: there is nothing to report")
    assert "Traceback" not in done.stderr and done.stdout == ""
    write_report_section("sft", 7, metrics={"SFT": {"GSM8K": metric(0.5, 10)}})
    done = run_module("report", "--output", tmp_path / "r.md")
    assert done.returncode == 0 and "GSM8K" in done.stdout and (tmp_path / "r.md").exists()
    assert json.loads((base_dir / "report" / "07-sft.json").read_text())["name"] == "sft"
