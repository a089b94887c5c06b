"""The report and the command: one page without scripts, its Markdown twin, and what they say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import tiny
from typer.testing import CliRunner

from knnlm_hf.cli import app
from knnlm_hf.errors import KNNLMError
from knnlm_hf.study import Outcome, Plot, Series, all_experiments, report
from knnlm_hf.study.outcome import FAILS, HOLDS, UNDECIDED, both
from knnlm_hf.study.plots import alone, draw
from knnlm_hf.study.tables import cell, table

FACTS = {
    "model": "me/<model>", "architecture": "GPT2LMHeadModel", "parameters": 1234567,
    "vocabulary": 61, "layers": ["att"], "window": 32, "stride": 16,
    "tokens": {"train": 1000, "valid": 200, "test": 300},
    "machine": "x86_64",
}  # fmt: skip


def result(name="base_lm", **changes):
    facts = {
        "experiment": name, "title": "A <title>", "row": 1, "section": "3",
        "hypothesis": "Does it?", "finding": "It does.", "verdict": HOLDS, "seconds": 1.5,
        "sentence": "Ratio 0.9 & more.",
        "rows": [{"setting": "a", "seed": 0, "lmbda": 0.25, "memory_perplexity": "inf"}],
        "plots": [
            {
                "title": "Plot & title", "x": "x", "y": "y", "kind": "line", "log_x": False,
                "level": 2.0, "level_name": "model alone",
                "series": [{"name": "s", "x": [1, 2], "y": [1.0, 3.0], "low": None, "high": None}],
            }
        ],
        "settings": {"k": 16, "eval_tokens": None}, "versions": {"torch": "2.13"},
        "command": "knnlm study run",
    }  # fmt: skip
    return facts | changes


def write(folder, *results):
    (folder / "results").mkdir()
    (folder / "results" / "study.json").write_text(json.dumps(FACTS))
    for one in results:
        (folder / "results" / f"{one['experiment']}.json").write_text(json.dumps(one))


class Tags(HTMLParser):
    """Every tag of a page, and whether they nest."""

    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class TestReport:
    def test_the_page_is_whole_and_needs_nothing_else(self, tmp_path):
        write(tmp_path, result(), result("datastore_size", row=8, verdict=UNDECIDED))
        page = report(tmp_path).read_text()
        tags = Tags()
        tags.feed(page)
        assert not tags.open
        names = [tag for tag, _ in tags.seen]
        assert "script" not in names
        assert "img" not in names
        assert names.count("svg") == 2
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
            tags.seen
        )
        assert "prefers-color-scheme: dark" in page
        assert "A &lt;title&gt;" in page
        assert "Ratio 0.9 &amp; more." in page
        assert "me/&lt;model&gt;" in page
        links = {attrs["href"] for tag, attrs in tags.seen if tag == "a"}
        assert links == {"#base_lm", "#datastore_size"}

    def test_ids_on_the_page_are_unique(self, tmp_path):
        write(tmp_path, result(), result("datastore_size"))
        found = re.findall(r'<(?:clipPath|path|g|h2) id="([^"]+)"', report(tmp_path).read_text())
        shared = {name for name in found if found.count(name) > 1}
        # Groups of matplotlib are named alike in every figure, and nothing refers to them.
        assert not [name for name in shared if f"#{name}" in report(tmp_path).read_text()]

    def test_the_markdown_says_the_same_and_its_plots_are_there(self, tmp_path):
        write(tmp_path, result())
        text = (report(tmp_path).parent / "README.md").read_text()
        assert "| 1 | A <title> | **holds** |" in text
        assert "Ratio 0.9 & more." in text
        (plot,) = re.findall(r"\]\((plots/[^)]+)\)", text)
        assert (tmp_path / "report" / plot).read_text().startswith("<svg")
        assert "∞" in text

    def test_each_result_keeps_the_settings_it_was_made_with(self, tmp_path):
        other = result("datastore_size", row=8, settings={"k": 9}, command="knnlm study run --k 9")
        write(tmp_path, result(), other, result("temperature", row=10))
        text = (report(tmp_path).parent / "README.md").read_text()
        assert "| versions | torch 2.13 |" in text
        assert "| settings, rows 1, 10 | k 16, eval_tokens all |" in text
        assert "| settings, row 8 | k 9 |" in text
        assert "| command, rows 1, 10 | knnlm study run |" in text
        assert "| command, row 8 | knnlm study run --k 9 |" in text

    def test_it_is_made_again_over_an_old_one(self, tmp_path):
        write(tmp_path, result())
        report(tmp_path)
        (tmp_path / "results" / "base_lm.json").write_text(json.dumps(result(verdict=FAILS)))
        assert "does not hold" in report(tmp_path).read_text()

    def test_results_of_another_model_are_left_out_and_named(self, tmp_path):
        mine, other = {"model": "m", "train": "t"}, {"model": "n", "train": "t"}
        write(tmp_path, result(of=mine), result("temperature", row=10, of=other, sentence="Other"))
        (tmp_path / "results" / "study.json").write_text(json.dumps(FACTS | {"of": mine}))
        page = report(tmp_path).read_text()
        text = (tmp_path / "report" / "README.md").read_text()
        for said in (page, text):
            assert "Other" not in said
            assert "results of another model or other texts, rows 10: run these again" in said
        write_again = result("temperature", row=10, of=mine, sentence="Other")
        (tmp_path / "results" / "temperature.json").write_text(json.dumps(write_again))
        page = report(tmp_path).read_text()
        assert "Other" in page
        assert "left out" not in page

    @pytest.mark.parametrize("damaged", ["{}", "[]", "null", "{", '{"plots": []}'])
    def test_a_damaged_result_is_skipped(self, tmp_path, damaged):
        write(tmp_path, result(), result("temperature"))
        (tmp_path / "results" / "temperature.json").write_text(damaged)
        assert report(tmp_path).read_text().count("<h2 id=") == 1
        (tmp_path / "results" / "study.json").write_text(damaged)
        with pytest.raises(KNNLMError, match="no results there"):
            report(tmp_path)

    def test_the_twin_says_the_seconds_too(self, tmp_path):
        write(tmp_path, result(seconds=7.6))
        assert "1 rows, 8 s" in report(tmp_path).read_text()
        assert "1 rows, 8 s" in (tmp_path / "report" / "README.md").read_text()

    def test_without_results_it_says_what_to_do(self, tmp_path):
        with pytest.raises(KNNLMError, match="knnlm study run"):
            report(tmp_path)


class TestPlots:
    def test_a_plot_takes_the_page_s_colour_and_width(self):
        svg = draw(result()["plots"][0], "a")
        head = svg[: svg.index(">")]
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert " width=" not in head
        assert "viewBox" in head
        assert "Plot &amp; title" in head
        assert "model alone" in svg
        assert "prefers-color-scheme" in alone(svg)
        assert draw(result()["plots"][0], "a") == svg

    def test_bars_with_intervals(self):
        plot = Outcome(
            rows=[], verdict=HOLDS, sentence="",
            plots=[
                Plot(
                    title="t", x="", y="y", kind="bar",
                    series=[Series("one", ["a", "b"], [1.0, 1.1], [0.9, 1.0], [1.1, 1.2])],
                )
            ],
        ).to_dict()["plots"][0]  # fmt: skip
        assert "axis cut" in draw(plot, "b")


class TestTables:
    def test_cells(self):
        assert cell(None) == ""
        assert cell(1234567) == "1,234,567"
        assert cell(0.123456) == "0.1235"
        assert cell(12345.6) == "12,346"
        assert cell("inf") == "∞"
        assert cell({"ratio": 0.5, "low": 0.25, "high": 1.0, "blocks": 3}) == "0.500 [0.250, 1.000]"

    def test_empty_columns_go_and_long_tables_are_thinned(self):
        rows = [{"perplexity": i, "setting": "a", "seed": 0, "top": None} for i in range(100)]
        head, body, left = table(rows)
        assert head == ["setting", "perplexity"]
        assert len(body) + left == 100
        assert len(body) <= 40


def test_what_is_certain_makes_the_verdict():
    assert both(True, False) == HOLDS
    assert both(False, True) == FAILS
    assert both(False, False) == UNDECIDED


def test_infinity_is_written_as_a_string():
    found = Outcome(rows=[{"p": float("inf")}], verdict=HOLDS, sentence="").to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["rows"] == [{"p": "inf"}]


class TestCommand:
    def test_list_names_every_experiment(self):
        done = CliRunner().invoke(app, ["study", "list", "--json"])
        assert done.exit_code == 0
        assert list(json.loads(done.stdout)) == [e.name for e in all_experiments()]

    def test_run_and_report(self, tmp_path):
        model = tmp_path / "model"
        tiny.gpt2().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        for number, split in enumerate(("train", "valid", "test")):
            words = " ".join(tiny.text(tiny.corpus(8, number)))
            (tmp_path / f"{split}.txt").write_text(words)
        options = [f"--{s}={tmp_path / s}.txt" for s in ("train", "valid", "test")]
        given = ["study", "run", str(model), *options, f"--out={tmp_path / 'out'}", "--quick"]
        given += ["--only=base_lm, base_lm", "--eval-tokens=64", "--json"]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["base_lm"] == HOLDS
        stored = json.loads((tmp_path / "out" / "results" / "base_lm.json").read_text())
        assert stored["settings"]["eval_tokens"] == 64
        assert stored["command"].split()[0] == "knnlm"
        again = CliRunner().invoke(app, ["study", "report", str(tmp_path / "out"), "--json"])
        assert json.loads(again.stdout)["report"] == facts["report"]

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--only=base_lm,nothing", "no experiment 'nothing'"),
            ("--only=base_lm nothing", "no experiment 'nothing'"),
            ("--only=, ", "--only names no experiment"),
            ("--layer=nose", "nose"), ("--only=nothing", "nothing"), ("--seed=-1", "seed is -1"),
            ("--train-tokens=1", "train has 1 tokens"), ("--exact-comparisons=nan", "nan"),
            ("--k=1000000000000", "k is 1000000000000"),
        ],
    )  # fmt: skip
    def test_a_bad_setting_is_one_line_that_names_it(self, option, said, tmp_path):
        model = tmp_path / "model"
        tiny.gpt2().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        text = tmp_path / "text.txt"
        text.write_text(" ".join(tiny.text(tiny.corpus(4, 0))))
        splits = [f"--{split}={text}" for split in ("train", "valid", "test")]
        given = ["study", "run", str(model), *splits, f"--out={tmp_path / 'out'}", option]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 2
        assert isinstance(done.exception, SystemExit)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert said in line

    def test_an_unknown_experiment_is_one_line_and_exit_code_2(self, tmp_path):
        done = CliRunner().invoke(app, ["study", "report", str(tmp_path)])
        assert done.exit_code == 2
        assert done.output.startswith("error: ")
