"""docs/formats.md is enough to read a store: its reader, which knows nothing of the library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import tiny
import torch

from knnlm_hf import KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead
from knnlm_hf.build import Datastore
from knnlm_hf.modeling import KNNLMConfig

PAGE = pages.DOCS / "formats.md"
READER = next(block.code for block in pages.blocks(PAGE) if block.language == "python")


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The page's functions, by name."""
    namespace: dict[str, Any] = {}
    exec(compile(READER, str(PAGE), "exec"), namespace)
    return namespace


@pytest.fixture
def read_store(reader: dict[str, Any]) -> Any:
    return reader["read_store"]


@pytest.fixture
def read_tensors(reader: dict[str, Any]) -> Any:
    return reader["read_tensors"]


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


def section(title: str) -> str:
    """What the page says under a heading of the second or third level."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^##+ {re.escape(title)}$(.*?)(?=^##|\Z)", page, flags=re.M | re.S)
    assert found, title
    return found[1]


def assert_named(title: str, *objects: Any) -> None:
    """Each field of these objects stands under that heading."""
    names = {name for found in objects for name in found}
    assert names
    assert [name for name in sorted(names) if f"`{name}`" not in section(title)] == []


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def grown(folder: Path) -> Datastore:
    """A store with an index, appended to and with a document removed."""
    store = build(folder, shard_size=50)
    store.build_index("exact", progress=False)
    store = store.append(tiny.gpt2(), tiny.corpus(2, seed=5), progress=False)
    store.remove(2)
    return store


def test_every_field_of_the_manifest_is_on_the_page(tmp_path) -> None:
    grown(tmp_path / "store")
    manifest = read(tmp_path / "store" / "manifest.json")
    parts = [manifest[name] for name in ("removed", "model")]
    assert_named("manifest.json", manifest, *parts, *manifest["shards"], *manifest["appended"])
    assert manifest["shards"][-1]["file"].endswith("-1.safetensors")
    assert "`shard-00002-1.safetensors`" in section("A datastore")


def test_an_index_is_as_the_page_says(tmp_path) -> None:
    store = grown(tmp_path / "store")
    (record,) = (tmp_path / "store" / "indexes").glob("*/index.json")
    assert_named("An index", read(record))
    digest = rows_digest(read(tmp_path / "store" / "manifest.json"))
    assert read(record)["digest"] == digest
    assert record.parent.name == f"l2-exact.{digest[:12]}"
    lines = [digest, *map(str, store.removed_documents)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == store.digest


def rows_digest(manifest: dict[str, Any]) -> str:
    """As the page has it under Digests."""
    lines = ["1", str(manifest["entries"]), *(shard["sha256"] for shard in manifest["shards"])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_heads_checkpoints_and_targets_are_as_the_page_says(tmp_path, read_tensors) -> None:
    store = build(tmp_path / "store")
    head = MultiEmbeddingHead.train_on(
        store, n=1, epochs=1, teacher=KNNMemory(store, k=8, index="exact"),
        checkpoint=tmp_path / "checkpoint", progress=False,
    )  # fmt: skip
    head.save_pretrained(tmp_path / "head")
    config = read(tmp_path / "head" / "config.json")
    common = ["kind", "hidden_size", "vocab_size", "layer"]
    assert set(common) < config["settings"].keys()
    assert_named("A head", config, config["trained"], common)
    saved = (tmp_path / "head" / "model.safetensors").read_bytes()
    assert config["sha256"] == hashlib.sha256(saved).hexdigest()
    state = read(tmp_path / "checkpoint" / "state.json")
    assert_named("Its checkpoint", state, state["identity"], state["progress"])
    check = state.pop("check")
    assert check == hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    manifest = read(tmp_path / "store.targets" / "manifest.json")
    assert_named("Soft targets", manifest, manifest["teacher"], *manifest["shards"])
    found = read_tensors(tmp_path / "store.targets" / manifest["shards"][0]["file"])
    assert found["tokens"].shape == found["probs"].shape == (len(store), manifest["tokens"])
    assert np.allclose(found["probs"].astype(float).sum(1), 1, atol=1e-2)


def test_a_saved_model_is_as_the_page_says(tmp_path) -> None:
    model, store = tiny.gpt2(), build(tmp_path / "store")
    memories = [KNNMemory(store, k=8), MultiEmbeddingHead(store.dim, store.vocab_size, n=1)]
    knn = KNNLMForCausalLM(model, memories, [0.2, 0.1])
    knn.save_pretrained(tmp_path / "knn", save_base=True, save_memory=True)
    config = read(tmp_path / "knn" / "config.json")
    ours = {name for name in inspect.signature(KNNLMConfig).parameters if name != "kwargs"}
    assert ours < config.keys()
    assert_named("A kNN model", ours, {"model_type", "folder"}, ["source", "revision", "settings"])
    assert [set(entry) for entry in config["memories"]] == [{"folder", "settings"}] * 2
    assert [entry["folder"] for entry in config["memories"]] == ["memory/0", "memory/1"]
    for name in ("base/", "memory/0/", "memory/1/", "modeling_knnlm.py", "generation_config.json"):
        assert name in section("A kNN model")
        assert (tmp_path / "knn" / name).exists()
