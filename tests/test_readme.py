"""The README's Python runs as printed, on a tiny model in place of the one from the Hub."""

import re
from pathlib import Path

import pytest
import tiny
import transformers

README = Path(__file__).parent.parent / "README.md"


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)


def test_the_readme_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny.gpt2()
    )
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: tiny.tokenizer()
    )
    for seed, split in enumerate(("train", "valid", "test")):
        text = "\n".join(tiny.text(tiny.corpus(20, seed=seed)))
        Path(f"{split}.txt").write_text(text)
    found = blocks(README)
    assert found
    for block in found:
        exec(compile(block, str(README), "exec"), {})
    assert "→" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", re.findall(r"^\| `([\w./`, ]+)` \|", README.read_text(), flags=re.M)
)
def test_the_file_map_names_what_exists(line):
    root = README.parent
    for name in re.split(r"`, `", line):
        assert (root / "src/knnlm_hf" / name).exists() or (root / name).exists(), name
