"""`knnlm explain`: the page it writes, what it prints, and what it refuses in one line."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, explanation_page, perplexity
from knnlm_hf.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_explain")
    base, tokenizer = tiny.gpt2(), tiny.tokenizer()
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store = Datastore.build(
        base, tiny.corpus(9), folder / "store", tokenizer=tokenizer, progress=False
    )
    knn = KNNLMForCausalLM(base, KNNMemory(store, k=9, temperature=2.0), 0.3)
    knn.save_pretrained(folder / "knn", tokenizer=tokenizer)
    (folder / "text.txt").write_text(max(tiny.text(tiny.corpus(seed=3)), key=len))
    (folder / "latin.txt").write_bytes("Ä".encode("latin-1"))
    return folder


def run(*args, code=0, stdin=None):
    result = runner.invoke(app, ["explain", *map(str, args)], input=stdin)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_page_of_a_store_and_of_a_saved_model(home, tmp_path):
    text = (home / "text.txt").read_text()
    settings = ("--k", "9", "--temperature", "2.0", "--lmbda", "0.3")
    out = "--out", tmp_path / "a.html", "--json"
    facts = json.loads(
        run(home / "model", home / "text.txt", home / "store", *settings, *out).stdout
    )
    knn = KNNLMForCausalLM.from_pretrained(home / "knn")
    page = explanation_page(knn, text, tiny.tokenizer(), title="text.txt")
    assert (tmp_path / "a.html").read_text() == page
    report = perplexity(knn, [text], tokenizer=tiny.tokenizer(), progress=False)
    assert facts["page"] == str(tmp_path / "a.html")
    assert facts["bytes"] == len(page.encode())
    assert (facts["tokens"], facts["cut"]) == (report.tokens, False)
    assert facts["perplexity"] == pytest.approx(report.perplexity, rel=1e-5)
    assert facts["base_perplexity"] == pytest.approx(report.base_perplexity, rel=1e-5)
    run(home / "knn", home / "text.txt", "--out", tmp_path / "b.html")
    assert (tmp_path / "b.html").read_text() == page


def test_standard_input_and_options(home, tmp_path):
    out = "--out", tmp_path / "page.html"
    few = "--tokens", "12", "--top", "2", "--window", "8", "--stride", "4"
    text = (home / "text.txt").read_text()
    facts = json.loads(run(home / "knn", "-", *out, *few, "--json", stdin=text).stdout)
    assert (facts["tokens"], facts["cut"]) == (11, True)
    knn = KNNLMForCausalLM.from_pretrained(home / "knn")
    options = {"limit": 12, "top": 2, "window": 8, "stride": 4}
    page = explanation_page(knn, text, tiny.tokenizer(), title="Standard input", **options)
    assert (tmp_path / "page.html").read_text() == page
    assert "base_perplexity" in run(home / "knn", "-", *out, stdin=text).stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{home}/knn", "{home}/nothing.txt"), "cannot be read"),
        (("{home}/knn", "{home}"), "cannot be read"),
        (("{home}/knn", "{home}/latin.txt"), "not UTF-8"),
        (("{home}/model", "{home}/text.txt"), "plain model"),
        (("{home}/knn", "{home}/text.txt", "--tokens", "1"), "limit is 1"),
        (("{home}/knn", "{home}/text.txt", "--top", "0"), "top is 0"),
        (("{home}/knn", "{home}/text.txt", "--window", "99"), "window is 99"),
        (("{home}/knn", "-"), "2 tokens"),
    ],
)
def test_refuses_in_one_line(home, tmp_path, args, says):
    out = tmp_path / "page.html"
    result = run(*(arg.format(home=home) for arg in args), "--out", out, code=2, stdin="w3")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


def test_refuses_a_place_where_no_file_can_be(home, tmp_path, monkeypatch):
    for out in (tmp_path, tmp_path / "missing" / "page.html"):
        assert "--out" in run(home / "knn", "-", "--out", out, code=2, stdin="w3 w9").stderr

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("knnlm_hf.datastore.atomic.write_bytes", full)
    error = run(home / "knn", "-", "--out", tmp_path / "page.html", code=2, stdin="w3 w9").stderr
    assert "cannot write the page: No space left" in error
