"""Every example runs, on a small model and the text that every Python carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import standin
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.shared(tmp_path_factory)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("remove_a_source.py", [], "without document"),
        ("head_instead_of_store.py", ["--epochs", "1"], "3 rows per token"),
    ],
)
def test_a_script(
    name: str, options: list[str], expected: str, model: Path, tmp_path: Path
) -> None:
    from knnlm_hf.demo.texts import reference

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(text.replace("\n\n", "\n") for text in reference()[40:70]))
    command = [sys.executable, EXAMPLES / name, "--model", model, "--corpus", corpus]
    ran = subprocess.run(
        [*command, "--out", tmp_path / "store", *options], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert expected in ran.stdout


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook(name: str, model: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nMODEL, STORE, EPOCHS = {str(model)!r}, {str(tmp_path / 's')!r}, 1"
    client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stripped(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert not any(cell.get("execution_count") for cell in notebook.cells)
