"""The stand-in of pages and examples is the same whatever seeds and threads a process has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import standin
import torch

SAVE = "import sys, pathlib, standin; standin.save(pathlib.Path(sys.argv[1]), steps=2)"


def test_merges_by_hand() -> None:
    # a b, c d, Ġ a and Ġ c occur twice each; of equals the first one is joined.
    assert standin.merges([" ab cd ab cd", "once"], 3) == [("a", "b"), ("c", "d"), ("Ġ", "ab")]
    assert standin.merges(["aaaa aaaa aaa"] * 2, 2) == [("a", "a"), ("aa", "aa")]


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def test_another_process_makes_the_same_files(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    standin.save(tmp_path / "here", steps=2)
    torch.set_num_threads(threads)
    surroundings = {
        **os.environ, "PYTHONPATH": str(Path(standin.__file__).parent), "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", SAVE, tmp_path / "there"], env=surroundings, check=True)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert {"model.safetensors", "tokenizer.json"} <= digests(tmp_path / "here").keys()
