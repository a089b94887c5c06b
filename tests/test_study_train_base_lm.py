"""examples/train_base_lm.py: what it refuses, in one line, before it trains anything."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_base_lm.py"
SMALL = ["--layers=1", "--width=16", "--heads=2", "--window=16", "--epochs=1"]
SENTENCE = "the cat sat on the mat and looked at the other cat . "


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text(SENTENCE * 20)
    (tmp_path / "valid.txt").write_text(SENTENCE * 4)
    hub = ModuleType("datasets")
    hub.load_dataset = no_such_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.chdir(tmp_path)

    def main(corpus="train.txt", valid="valid.txt", vocab=300):
        given = ["model", corpus, "--valid", valid, "--vocab", str(vocab), *SMALL]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *given])
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    return main


def no_such_dataset(name, config, split):
    raise FileNotFoundError(f"no dataset {name}\nand more")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"corpus": "trian.txt"}, "trian.txt: expected a text file .*: no dataset trian.txt$"),
        ({"valid": "vaild.txt"}, "vaild.txt: expected a text file .*No such file"),
    ],
)
def test_a_mistyped_path_is_one_line(run, wrong, said):
    with pytest.raises(SystemExit, match=said) as caught:
        run(**wrong)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)


def test_a_file_in_the_folder_s_way_is_one_line(run, tmp_path):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(SystemExit, match=r"error: model.*: cannot be written: "):
        run()


def test_another_text_or_vocabulary_does_not_keep_the_old_tokenizer(run, tmp_path):
    run()
    before = (tmp_path / "model" / "tokenizer.json").read_bytes()
    (tmp_path / "other.txt").write_text(SENTENCE * 21)
    for changed in ({"corpus": "other.txt"}, {"vocab": 290}):
        with pytest.raises(SystemExit, match="error: model: its tokenizer was not trained on this"):
            run(**changed)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == before
    run()
    (tmp_path / "model" / "tokenizer_of.json").unlink()
    with pytest.raises(SystemExit, match="give the same as before"):
        run()
