"""The demonstration, with few steps, and the examples."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import Datastore, perplexity
from knnlm_hf.demo import run, texts
from knnlm_hf.errors import CorpusError

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_text_that_ships_with_python():
    topics = texts.reference()
    assert sum(map(len, topics)) > 200_000
    train, valid, test = texts.split(topics)
    assert sorted([*train, *valid, *test]) == sorted(topics)
    assert min(len(valid), len(test)) >= 8
    assert any("file" in text for text in texts.docstrings())


def test_the_demonstration_lowers_the_perplexity(tmp_path, capsys, monkeypatch):
    few, fewer = texts.reference()[::8], texts.docstrings()[:40]
    monkeypatch.setattr("knnlm_hf.demo.show.reference", lambda: few)
    monkeypatch.setattr("knnlm_hf.demo.show.docstrings", lambda: fewer)
    facts = run(tmp_path, steps=8)
    assert facts["perplexity"] < facts["base_perplexity"]
    assert facts["lmbda"] > 0
    printed = capsys.readouterr().out
    for part in ("Datastore", "Tuned", "Perplexity", "Generation", "came from"):
        assert part in printed
    Datastore.open(tmp_path / "store").verify()


def test_a_model_and_a_corpus_of_one_s_own(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.text(tiny.corpus(120))))
    facts = run(
        tmp_path, model=str(tmp_path / "model"), corpus=str(tmp_path / "corpus.txt"), quiet=True
    )
    assert facts["perplexity"] < facts["base_perplexity"]
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(CorpusError, match="lines"):
        run(tmp_path, model=str(tmp_path / "model"), corpus=str(tmp_path / "short.txt"), quiet=True)


def train_base_lm(monkeypatch, *arguments):
    """Run the example in this process."""
    path = EXAMPLES / "train_base_lm.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_train_a_base_model(tmp_path, monkeypatch, capsys, arch):
    sentence = "the cat sat on the mat and looked at the other cat . "
    (tmp_path / "train.txt").write_text(sentence * 60)
    (tmp_path / "valid.txt").write_text(sentence * 4)
    sizes = "--layers 1 --width 16 --heads 2 --window 16 --vocab 300"
    recipe = "--epochs 9 --lr 1e-2 --batch-size 4 --dropout 0"
    train_base_lm(
        monkeypatch, tmp_path / "model", tmp_path / "train.txt", "--valid", tmp_path / "valid.txt",
        "--arch", arch, *f"{sizes} {recipe}".split(),
    )  # fmt: skip
    assert "validation perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == arch
    assert model.config.vocab_size == len(tokenizer)
    found = perplexity(model, [sentence * 4], tokenizer=tokenizer, progress=False)
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert found.perplexity < 5
    assert facts["valid_perplexity"] < 5
    assert not (tmp_path / "model" / "checkpoint").exists()


def test_a_base_model_needs_a_text_to_stop_by(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("a b c " * 9)
    with pytest.raises(SystemExit, match="error: --valid is missing: early stopping needs a text"):
        train_base_lm(monkeypatch, tmp_path / "model", tmp_path / "train.txt")
