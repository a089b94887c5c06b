"""docs/formats.md is enough to read a store: its reader, which knows nothing of the library."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import tiny
import torch

from knnlm_hf.build import Datastore

PAGE = pages.DOCS / "formats.md"
READER = next(block.code for block in pages.blocks(PAGE) if block.language == "python")


@pytest.fixture(scope="module")
def read_store() -> Any:
    """The page's function."""
    namespace: dict[str, Any] = {}
    exec(compile(READER, str(PAGE), "exec"), namespace)
    return namespace["read_store"]


def build(folder: Path, **options: Any) -> Datastore:
    return Datastore.build(tiny.gpt2(), tiny.corpus(), folder, progress=False, **options)


def test_the_reader_knows_nothing_of_the_library() -> None:
    names = set()
    for node in ast.walk(ast.parse(READER)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names == {"hashlib", "json", "struct", "pathlib", "numpy"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_size", [7, 1_000_000])
def test_it_reads_what_is_there(read_store, tmp_path, dtype, shard_size) -> None:
    store = build(tmp_path / "store", dtype=dtype, shard_size=shard_size)
    manifest, found = read_store(tmp_path / "store")
    assert manifest["entries"] == len(store) == len(found["keys"])
    assert np.array_equal(found["keys"], store.keys[:].float().numpy())
    assert np.array_equal(found["values"], store.values.numpy())
    assert np.array_equal(found["document"], store.document(torch.arange(len(store))).numpy())
    assert found["live"].all()


def test_removed_and_appended(read_store, tmp_path) -> None:
    store = build(tmp_path / "store", shard_size=50)
    model = tiny.gpt2()
    store = store.append(model, tiny.corpus(2, seed=5), progress=False)
    gone = [2, store.documents - 1]
    store.remove(gone)
    manifest, found = read_store(tmp_path / "store")
    assert manifest["version"] == 2
    assert np.array_equal(found["values"], store.values.numpy())
    assert np.array_equal(found["live"], ~np.isin(found["document"], gone))
    assert found["live"].sum() == store.live < len(store)
    store.compact(tmp_path / "compact", progress=False)
    _, compacted = read_store(tmp_path / "compact")
    assert np.array_equal(compacted["values"], found["values"][found["live"]])
    assert np.array_equal(compacted["document"], found["document"][found["live"]])


def test_every_field_of_the_manifest_is_on_the_page(read_store, tmp_path) -> None:
    store = build(tmp_path / "store")
    store.append(tiny.gpt2(), tiny.corpus(2, seed=5), progress=False).remove(2)
    manifest, _ = read_store(tmp_path / "store")
    page = PAGE.read_text(encoding="utf-8")
    named = [*manifest, *manifest["shards"][0], *manifest["removed"], *manifest["model"]]
    assert [name for name in named if f"`{name}`" not in page] == []
