"""The README's Python runs as printed, on a tiny model in place of the one from the Hub."""

import re
from pathlib import Path

import pages
import pytest
import tiny

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.gpt2().save_pretrained("gpt2")  # in the current folder, so that it is found by that name
    tiny.tokenizer().save_pretrained("gpt2")
    for seed, split in enumerate(("train", "valid", "test")):
        text = "\n".join(tiny.text(tiny.corpus(20, seed=seed)))
        Path(f"{split}.txt").write_text(text)
    assert pages.run(README) == 1


@pytest.mark.parametrize(
    "line", re.findall(r"^\| `([\w./`, ]+)` \|", README.read_text(), flags=re.M)
)
def test_the_file_map_names_what_exists(line):
    root = README.parent
    for name in re.split(r"`, `", line):
        assert (root / "src/knnlm_hf" / name).exists() or (root / name).exists(), name
