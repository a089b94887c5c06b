"""A store that goes on with new documents against one built of all of them at once."""

import json
import shutil

import pytest
import tiny
import torch
from filelock import FileLock

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory
from knnlm_hf.errors import CorpusError, DatastoreError, ModelMismatchError, SearchIndexError
from knnlm_hf.index import ExactIndex, built_indexes
from knnlm_hf.index.faiss import FaissIndex

faiss = pytest.importorskip("faiss")

OLD, NEW, MORE = (tiny.corpus(documents=n, seed=n, longest=50) for n in (4, 3, 2))
BIG = tiny.corpus(documents=8, seed=5)
MODEL = tiny.gpt2()


def build(path, items=OLD, **options):
    settings = {"window": 16, "stride": 6, "batch_size": 3, "shard_size": 30, "progress": False}
    return Datastore.build(MODEL, items, path, **{**settings, **options})


def append(store, items=NEW, model=MODEL, **options):
    return store.append(model, items, progress=False, **options)


def same(grown, whole):
    """Values and documents to the letter; keys up to the rounding of other batches."""
    assert len(grown) == len(whole)
    assert grown.documents == whole.documents
    assert torch.equal(grown.values, whole.values)
    assert torch.equal(grown.document_starts, whole.document_starts)
    torch.testing.assert_close(grown.keys[:].float(), whole.keys[:].float(), rtol=1e-2, atol=1e-2)
    assert [shard.rows for shard in grown.manifest.shards] == [
        shard.rows for shard in whole.manifest.shards
    ]
    grown.verify()


def entries(items):
    return sum(max(0, len(item) - 1) for item in items)


@pytest.mark.parametrize("tail", [[], [[]], [[3], [], [9]]])
@pytest.mark.parametrize("shard_size", [7, 30, entries(OLD), 1000])
def test_as_if_built_at_once(tmp_path, shard_size, tail):
    old = [*OLD, *tail]
    store = build(tmp_path / "s", old, shard_size=shard_size)
    grown = append(store)
    same(grown, build(tmp_path / "whole", [*old, *NEW], shard_size=shard_size))
    named = {shard.file for shard in grown.manifest.shards}
    assert {file.name for file in grown.path.glob("*.safetensors")} == named
    assert not (grown.path / ".append").exists()
    assert not list(grown.path.glob("*.tmp"))
    last = len(grown) - 1
    assert grown.document(last) == len(old) + len(NEW) - 1
    assert grown.context(last, 2, 2) == NEW[-1][-3:]
    assert f"{len(grown):,} entries" in (grown.path / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twice(tmp_path, dtype):
    store = append(append(build(tmp_path / "s", dtype=dtype)), [*MORE, []])
    same(store, build(tmp_path / "whole", [*OLD, *NEW, *MORE, []], dtype=dtype))
    assert len(store.manifest.appended) == 2


def test_a_knn_model_and_the_tokenizer_kept_with_the_store(tmp_path):
    tokenizer = tiny.tokenizer()
    store = build(tmp_path / "s", tiny.text(OLD[2:]), tokenizer=tokenizer)
    knn = KNNLMForCausalLM(MODEL, KNNMemory(store, k=2), lmbda=0.5)
    grown = append(store, tiny.text(NEW[2:]), knn)  # its tokenizer is kept with the store
    same(grown, build(tmp_path / "whole", tiny.text([*OLD[2:], *NEW[2:]]), tokenizer=tokenizer))


def test_a_reader_keeps_what_it_opened(tmp_path):
    store = build(tmp_path / "s", shard_size=1000)
    expected = store.values.clone(), store.keys[:].clone(), store.document_starts.clone()
    reader = Datastore.open(store.path)  # has read nothing yet
    memory = KNNMemory(reader, k=3, index="exact")
    near = memory.search(reader.keys[:4])
    grown = append(store)
    assert len(grown) > len(reader) == len(expected[0])
    for mine, theirs in zip(
        (reader.values, reader.keys[:], reader.document_starts), expected, strict=True
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(memory.search(reader.keys[:4]).ids, near.ids)
    reader.remove([3])  # an old reader may still take out a document, of the grown store too
    assert Datastore.open(store.path).removed_documents == [3] == reader.removed_documents
    assert len(Datastore.open(store.path)) == len(grown)


def test_removed_documents_stay_removed(tmp_path):
    store = build(tmp_path / "s")
    store.remove([2, 5])
    grown = append(store)
    assert grown.removed_documents == [2, 5]
    grown.remove([len(OLD) + 3])
    memory = KNNMemory(grown, k=len(grown), index="exact", temperature=1.0)
    near = memory.search(grown.keys[:3])
    found = set(grown.document(near.ids[near.ids >= 0]).tolist())
    assert found.isdisjoint({2, 5, len(OLD) + 3})
    assert (near.ids >= 0).sum(dim=1).tolist() == [grown.live] * 3
    compacted = grown.compact(tmp_path / "c", progress=False)
    kept = [item for i, item in enumerate([*OLD, *NEW]) if i not in (2, 5, len(OLD) + 3)]
    assert compacted.values.tolist() == [token for item in kept for token in item[1:]]
    assert compacted.documents == len(OLD) + len(NEW)
    append(compacted, MORE).verify()


def test_the_same_append_is_done_once(tmp_path):
    grown = append(build(tmp_path / "s"))
    assert append(grown).digest == grown.digest
    assert len(append(grown, resume=False)) == len(grown) + entries(NEW)


def interrupted(items):
    yield from items
    raise KeyboardInterrupt


def test_an_interrupted_append_resumes(tmp_path):
    store = build(tmp_path / "s", shard_size=30)
    with pytest.raises(KeyboardInterrupt):
        append(store, interrupted(BIG))
    assert Datastore.open(store.path).digest == store.digest
    with pytest.raises(DatastoreError, match=r"corpus is not.*resume=False drops it"):
        append(store, MORE)
    calls = []
    model = tiny.gpt2()
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    grown = append(store, BIG, model=model)
    same(grown, build(tmp_path / "whole", [*OLD, *BIG], shard_size=30))
    total = len(calls)
    calls.clear()
    append(store, BIG, model=model, resume=False)
    assert total < len(calls)


def test_what_is_unfinished_can_be_dropped(tmp_path):
    store = build(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        append(store, interrupted(NEW))
    same(append(store, MORE, resume=False), build(tmp_path / "whole", [*OLD, *MORE]))


def test_refusals(tmp_path):
    store = build(tmp_path / "s")
    before = store.digest
    with pytest.raises(ModelMismatchError, match="weights changed"):
        append(store, model=tiny.gpt2(seed=1))
    with pytest.raises(CorpusError, match="outside"):
        append(store, [[1, 99]])
    with pytest.raises(CorpusError, match="2 tokens"):
        append(store, [[1]])
    with (
        FileLock(store.path / ".lock"),
        pytest.raises(DatastoreError, match="another process"),
    ):
        append(store)
    with pytest.raises(DatastoreError, match="subsample"):
        append(store.subsample(0.5, tmp_path / "half"))
    assert Datastore.open(store.path).digest == before
    grown = append(store)
    with pytest.raises(DatastoreError, match="appended to"):
        build(store.path)
    assert Datastore.open(store.path).digest == grown.digest


SPECS = [
    "exact", "Flat", "HNSW8", "IVF4,Flat", "IVF4,PQ4x4fs,Refine(keys)", "SQ8", "RR8,IVF4,PQ8x4fs",
]  # fmt: skip


def test_indexes_take_in_the_new_entries(tmp_path):
    store = build(tmp_path / "s", [*OLD, *NEW])
    for spec in SPECS:
        store.build_index(spec, progress=False)
    store.build_index("Flat", metric="ip", progress=False)
    earlier = KNNMemory(store, k=5, index="IVF4,Flat")
    near = earlier.search(store.keys[:9])
    grown = append(store, MORE)
    assert torch.equal(earlier.search(store.keys[:9]).ids, near.ids)
    assert len(built_indexes(grown.path / "indexes")) == len(SPECS) + 1  # the old ones are gone
    new = grown.keys[len(store) :]
    for spec in SPECS:
        memory = KNNMemory(grown, k=5, index=spec)
        assert isinstance(memory.index, ExactIndex if spec == "exact" else FaissIndex)
        info = memory.index.info
        if info is not None:
            assert info.entries == len(grown)
            assert info.trained == (
                len(grown) if spec in ("exact", "Flat", "HNSW8") else len(store)
            )
        if spec not in ("HNSW8", "SQ8"):
            memory.k = len(grown)
            if "IVF" in spec:
                memory.index.nprobe = 4
            mine = memory.search(new).ids.sort(dim=1).values
            assert torch.equal(mine, torch.arange(len(grown)).expand(len(new), -1))
            if not spec.startswith("RR"):  # which has codes only
                memory.k = 1
                assert memory.search(new).similarity.max() >= -1e-3
    assert KNNMemory(grown, metric="ip", index="Flat").index.info.entries == len(grown)
    with pytest.raises(SearchIndexError, match=r"older than its store|is missing|no index"):
        KNNMemory(store, index="Flat")  # the earlier state's index went with it


def test_an_index_that_cannot_grow_so_far_is_stale(tmp_path, caplog):
    store = build(tmp_path / "s", MORE)
    store.build_index("IVF2,Flat", progress=False)
    grown = append(store, [*OLD, *NEW, *OLD])
    assert "is not extended" in caplog.text
    assert "build_index('IVF2,Flat'" in caplog.text
    with pytest.raises(SearchIndexError, match=r"older than its store.*rebuild it"):
        KNNMemory(grown)
    grown.build_index("IVF2,Flat", progress=False)
    assert len(KNNMemory(grown).index) == len(grown)


def test_a_damaged_index_does_not_stop_an_append(tmp_path, caplog):
    store = build(tmp_path / "s", [*OLD, *NEW])
    store.build_index("Flat", progress=False)
    (file,) = (store.path / "indexes").glob("*/*.faiss")
    file.write_bytes(file.read_bytes()[:-1])
    grown = append(store, MORE)
    assert "is not extended" in caplog.text
    with pytest.raises(SearchIndexError, match="rebuild"):
        KNNMemory(grown)


def test_a_reader_that_opens_while_it_grows(tmp_path, monkeypatch):
    """The manifest is read just before it is replaced, the shards just after."""
    store = build(tmp_path / "s")
    grown = append(build(tmp_path / "grown"))
    real, calls = Datastore.__init__, []

    def late(self, path, manifest):
        if not calls:
            calls.append(1)
            shutil.rmtree(store.path)
            shutil.copytree(grown.path, store.path)
        real(self, path, manifest)

    monkeypatch.setattr(Datastore, "__init__", late)
    opened = Datastore.open(store.path)
    assert opened.digest == grown.digest
    assert len(opened.values) == len(grown)


def test_a_memory_that_opens_while_it_grows(tmp_path, monkeypatch):
    """The store is opened before an append, its index after."""
    store = build(tmp_path / "s", [*OLD, *NEW])
    store.build_index("Flat", progress=False)
    real, grown = KNNMemory._find_index, []

    def late(self, index):
        if not grown:
            grown.append(append(store, MORE))
        return real(self, index)

    monkeypatch.setattr(KNNMemory, "_find_index", late)
    memory = KNNMemory(store.path, index="Flat")
    assert len(memory.index) == len(memory.store) == len(grown[0])


def test_the_format_is_the_old_one(tmp_path):
    """Whoever reads stores without appends reads these too."""
    grown = append(build(tmp_path / "s"))
    manifest = json.loads((grown.path / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert [part["documents"] for part in manifest["appended"]] == [len(NEW)]
