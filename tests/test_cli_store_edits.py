"""`knnlm remove`, `append` and `compact`, end to end."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from knnlm_hf import Datastore
from knnlm_hf.cli import app

TEXTS = tiny.text(tiny.corpus(8)[2:])


def run(*args, code=0):
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return json.loads(result.stdout) if code == 0 else result.stderr


@pytest.fixture
def home(tmp_path):
    model = tiny.gpt2()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    Datastore.build(
        model, TEXTS[:5], tmp_path / "s", tokenizer=tiny.tokenizer(), progress=False
    ).build_index("Flat", progress=False)
    (tmp_path / "more.txt").write_text("\n".join(TEXTS[5:]))
    return tmp_path


def test_a_store_that_changes(home):
    facts = run("remove", home / "s", 1, 3)
    assert (facts["documents"], facts["removed_documents"]) == (5, 2)
    assert run("info", home / "s")["removed_documents"] == 2
    facts = run("append", home / "model", home / "more.txt", home / "s", "--lines")
    assert facts["documents"] == len(TEXTS)
    assert facts["indexes"] == ["Flat (l2)"]
    again = run("append", home / "model", home / "more.txt", home / "s", "--lines")
    assert again["entries"] == facts["entries"]
    assert run("verify", home / "s")["verified"]
    facts = run("compact", home / "s", home / "c")
    kept = [text for i, text in enumerate(TEXTS) if i not in (1, 3)]
    assert facts["entries"] == sum(len(text.split()) - 1 for text in kept)
    assert facts["removed_documents"] == 0


def test_refusals_are_one_line(home):
    for args, message in (
        (("remove", home / "s", 9), "document 9 is not in the store"),
        (("remove", home, 1), "no datastore"),
        (("append", home / "nowhere", home / "more.txt", home / "s"), "model"),
        (("compact", home / "s", home / "model"), "already exists"),
    ):
        error = run(*args, code=2)
        assert message in error
        assert len(error.strip().splitlines()) == 1
