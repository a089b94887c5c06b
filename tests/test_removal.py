"""Removed documents: no neighbour, sample or training entry comes from them, whatever searches."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import stores
import torch
from filelock import FileLock
from tiny import Keys

from knnlm_hf import Datastore, KNNMemory
from knnlm_hf.datastore.removal import Removed
from knnlm_hf.errors import DatastoreError, KNNLMError, SettingError
from knnlm_hf.index import ExactIndex, SearchIndex, self_check
from knnlm_hf.memory.entries import Entries

faiss = pytest.importorskip("faiss")

SPECS = [
    "exact", "Flat", "IVF8,Flat", "IVF16,SQ8", "IVF8,PQ8x4fs,Refine(keys)", "PCA8,IVF8,Flat", "SQ8",
    "PQ8x4", "HNSW16", "LSH,Refine(keys)", "RR16,IVF8,PQ16x4fs",
]  # fmt: skip


def test_by_hand():
    starts = torch.tensor([0, 3, 3, 5, 9])  # of 10 entries; document 1 has none
    removed = Removed(torch.tensor([1, 2, 4]), starts, 10)
    assert removed.entries == 3
    assert removed.covers(torch.arange(10)).nonzero().flatten().tolist() == [3, 4, 9]
    assert removed.nth_live(torch.arange(7)).tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert removed.covers(torch.tensor([[-1, 3], [9, 0]])).tolist() == [
        [False, True],
        [True, False],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_ranges_against_a_mask(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, 12) * rng.integers(0, 2, 12)
    starts, count = np.cumsum(lengths) - lengths, int(lengths.sum())
    documents = np.flatnonzero(rng.random(12) < rng.random())
    dead = np.isin(np.repeat(np.arange(12), lengths), documents)
    removed = Removed(torch.tensor(documents), torch.tensor(starts), count)
    assert removed.entries == dead.sum()
    assert removed.covers(torch.arange(count)).tolist() == dead.tolist()
    live = np.flatnonzero(~dead)
    assert removed.nth_live(torch.arange(len(live))).tolist() == live.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    store = stores.random(tmp_path_factory.mktemp("stores") / "s")
    for spec in SPECS[:-1]:
        store.build_index(spec, progress=False)
    store.build_index(SPECS[-1], progress=False)
    return store.path


@pytest.fixture
def store(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "s")
    return Datastore.open(tmp_path / "s")


def owners_of(store):
    return store.document(torch.arange(len(store)))


def nearest(queries, keys, live, k):
    """Ids of the k nearest live keys, in float64 numpy."""
    q, x = queries.double().numpy(), keys.double().numpy()
    distance = np.stack([((x - row) ** 2).sum(axis=1) for row in q])
    distance[:, ~live.numpy()] = np.inf
    return torch.from_numpy(np.argsort(distance, axis=1, kind="stable")[:, :k])


def check(memory, gone, k, exact):
    """Search with the removed documents' own keys, and with others."""
    store = memory.store
    owners = owners_of(store)
    live = ~torch.isin(owners, torch.tensor(gone))
    for queries in (store.keys[:][~live][::9], store.keys[:][live][::37]):
        near = memory.search(queries, k)
        found = min(k, int(live.sum()))
        assert bool((near.ids[:, :found] >= 0).all())
        assert bool((near.ids[:, found:] == -1).all())
        assert bool(live[near.ids[:, :found]].all())
        assert all(len(set(row)) == found for row in near.ids[:, :found].tolist())
        assert bool((near.similarity[:, :found].diff(dim=1) <= 0).all())
        assert torch.equal(near.tokens[:, :found], store.values[near.ids[:, :found]].long())
        if exact:
            assert torch.equal(near.ids[:, :found], nearest(queries, store.keys[:], live, found))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("gone", [[5], [0, 2, 4, 7, 8, 9], [*range(14), 15, 16]])
def test_no_backend_returns_a_removed_neighbour(store, spec, gone):
    memory = KNNMemory(store, k=20, index=spec)
    usual = getattr(memory.index, "nprobe", None)
    before = memory.search(store.keys[::50], 5)
    store.remove(gone)
    for k in (1, 20, 100):
        check(memory, gone, k, exact=spec in ("exact", "Flat"))
    assert getattr(memory.index, "nprobe", None) == usual
    # What was near and is live stays as near as it was.
    after = memory.search(store.keys[::50], 5)
    kept = ~torch.isin(store.document(before.ids), torch.tensor(gone))
    if spec in ("exact", "Flat"):
        for i, j, keep in zip(before.ids, after.ids, kept, strict=True):
            assert set(i[keep].tolist()) <= set(j.tolist())
    again = KNNMemory(store.path, k=20, index=spec)
    assert torch.equal(again.search(store.keys[::50], 5).ids, after.ids)


@pytest.mark.parametrize("spec", ["IVF8,Flat", "IVF8,PQ8x4fs,Refine(keys)", "PCA8,IVF8,Flat"])
def test_more_lists_are_visited_where_the_nearest_are_dead(store, spec):
    memory = KNNMemory(store, k=20, index=spec)
    memory.index.nprobe = 1
    store.remove([0, 1, 2, 5, 6, 7])
    near = memory.search(store.keys[:120:7])
    assert bool((near.ids >= 0).all())
    assert not bool(torch.isin(store.document(near.ids), torch.arange(8)).any())
    assert memory.index.nprobe == 1


class Custom(SearchIndex):
    """An index of one's own that knows nothing of removal."""

    def __init__(self, keys, metric):
        super().__init__(metric, keys.dim)
        self.inner = ExactIndex(keys, metric)

    def __len__(self):
        return len(self.inner)

    def _search(self, queries_QD, k):
        return self.inner._search(queries_QD, k)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["custom", "faiss"])
def test_an_index_of_ones_own(store, kind, metric):
    own = faiss.IndexFlatL2(16) if metric == "l2" else faiss.IndexFlatIP(16)
    own.add(store.keys[:].numpy())
    index = Custom(store.keys, metric) if kind == "custom" else own
    memory = KNNMemory(store, k=7, index=index, metric=metric)
    store.remove([0, 1, 6, 9])
    check(memory, [0, 1, 6, 9], 30, exact=metric == "l2")


@pytest.mark.parametrize("rescore", [False, True])
def test_with_exclusion_and_rescoring(store, rescore):
    memory = KNNMemory(store, k=10, index="IVF16,SQ8", rescore=rescore)
    store.remove([1, 6])
    ids = torch.arange(0, len(store), 50)
    near = memory.search(store.keys[ids], exclude=ids)
    assert bool((near.ids >= 0).all())
    assert not bool((near.ids == ids[:, None]).any())
    assert not bool(torch.isin(store.document(near.ids), torch.tensor([1, 6])).any())


def test_everything_removed_is_a_missing_hit(store):
    memory = KNNMemory(store, k=3, index="exact", temperature=1.0)
    others = [
        KNNMemory(store, k=3, index=spec, temperature=1.0) for spec in ("IVF8,Flat", "HNSW16")
    ]
    store.remove(range(store.documents))
    assert store.live == 0
    for one in (memory, *others):
        assert one.search(store.keys[:2]).ids.tolist() == [[-1] * 3] * 2
        assert bool((one.log_probs(store.keys[:2]) == -torch.inf).all())
    for refused in (lambda: store.compact(store.path.with_name("c")), lambda: Entries(store, 0)):
        with pytest.raises(KNNLMError, match=r"every entry is removed|0 entries"):
            refused()


def test_at_once_and_for_good(store, caplog):
    reader = Datastore.open(store.path)
    digest, rows = store.digest, store.manifest.rows_digest
    assert store.removed is None
    store.remove([2])
    assert store.removed_documents == [2]
    assert store.live == len(store) - 40
    assert store.digest != digest
    assert store.manifest.rows_digest == rows
    first = {file.name for file in store.path.glob("removed-*")}
    store.remove(torch.tensor([9, 2]))
    store.remove(np.int64(9))
    second = {file.name for file in store.path.glob("removed-*")}
    assert len(first) == len(second) == 1
    assert first != second
    assert Datastore.open(store.path).removed_documents == store.removed_documents == [2, 9]
    assert Datastore.open(store.path).digest == store.digest
    assert reader.removed is None  # it sees what it opened
    reader.remove(10)
    assert reader.removed_documents == [2, 9, 10]  # and what was removed meanwhile
    assert not caplog.records
    reader.remove(range(12))
    assert "compact" in caplog.text
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["version"] == 2
    Datastore.open(store.path).verify()


def test_text_samples_and_training_leave_them_out(store, tmp_path):
    gone = torch.tensor([0, 5, 12])
    live = ~torch.isin(owners_of(store), gone)
    store.remove(gone)
    with pytest.raises(DatastoreError, match=r"document 0 .*removed"):
        store.context(3)
    assert store.document(3) == 0
    entry = int(live.nonzero()[0])
    assert store.context(entry, 0, 1) == store.values[entry : entry + 2].tolist()
    sample = store.subsample(0.5, tmp_path / "half")
    assert len(sample) == round(0.5 * int(live.sum()))
    assert not bool(torch.isin(owners_of(sample), gone).any())
    assert sample.removed is None
    kept = {tuple(key) for key in store.keys[live.nonzero().flatten()].tolist()}
    assert {tuple(key) for key in sample.keys[:].tolist()} <= kept
    entries = Entries(store, 0)
    seen = torch.cat([batch.ids for batch in (*entries.epoch(0, 64), *entries.held_out(64))])
    assert seen.sort().values.tolist() == live.nonzero().flatten().tolist()


def test_the_self_check_leaves_them_out(store):
    index = ExactIndex(store.keys)
    store.remove([0, 1, 2, 5, 6, 7])
    owners = owners_of(store)
    found = self_check(index, store.keys, store.values, removed=store.removed)
    assert found["k"] == store.live - 1
    assert found["recall"] == 1.0
    live = store.keys[:][~torch.isin(owners, torch.tensor(store.removed_documents))]
    only = self_check(ExactIndex(Keys(live)), Keys(live), store.values[: len(live)])
    assert found["temperature"] == pytest.approx(only["temperature"], rel=0.2)
    built = store.build_index("Flat", progress=False)
    assert built.info.self_check["recall"] == 1.0
    memory = KNNMemory(store, index=ExactIndex(store.keys))
    assert memory.temperature == pytest.approx(only["temperature"], rel=0.5)


def test_compact(store, tmp_path):
    store.remove([0, 6, 17])
    live = ~torch.isin(owners_of(store), torch.tensor([0, 6, 17]))
    compacted = store.compact(tmp_path / "c", progress=False)
    assert compacted.removed is None
    assert len(compacted) == store.live
    assert torch.equal(compacted.keys[:], store.keys[:][live])
    assert torch.equal(compacted.values, store.values[live])
    assert compacted.documents == store.documents
    assert torch.equal(owners_of(compacted), owners_of(store)[live])
    assert compacted.context(0) == compacted.values[:9].tolist()
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["version"] == 1
    assert not list((tmp_path / "c").glob("removed-*"))
    assert not (tmp_path / "c" / "indexes").exists()
    with pytest.raises(DatastoreError, match="already exists"):
        store.compact(tmp_path / "c")
    # The same search, but for the numbers.
    numbers = live.nonzero().flatten()
    mine = KNNMemory(store, k=9, index="exact").search(store.keys[::40])
    theirs = KNNMemory(compacted, k=9, index="exact").search(store.keys[::40])
    assert torch.equal(mine.ids, numbers[theirs.ids])
    assert torch.equal(mine.similarity, theirs.similarity)


def test_a_store_with_removed_documents_is_not_pushed(store):
    store.remove([1])
    with pytest.raises(DatastoreError, match=r"1 removed documents.*compact"):
        store.push_to_hub("me/store")


@pytest.mark.parametrize("wrong", [[18], [-1], [], [True], ["3"], "3", [1.0], [0, 99], None])
def test_no_such_document(store, wrong):
    before = (store.path / "manifest.json").read_bytes()
    with pytest.raises(SettingError):
        store.remove(wrong)
    assert (store.path / "manifest.json").read_bytes() == before


def test_two_writers_are_refused(store):
    with FileLock(store.path / ".lock"):
        for write in (lambda: store.remove([1]), lambda: store.build_index("Flat")):
            with pytest.raises(DatastoreError, match="another process"):
                write()
    assert store.removed is None


def test_another_store_in_its_place(store):
    other = stores.random(store.path.with_name("other"), seed=1)
    (store.path / "manifest.json").write_bytes((other.path / "manifest.json").read_bytes())
    with pytest.raises(DatastoreError, match="another store"):
        store.remove([1])


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove", "other", "order"])
def test_a_damaged_side_file(store, damage):
    store.remove([1, 5])
    (file,) = store.path.glob("removed-*")
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage in ("other", "order"):
        documents = [5, 1] if damage == "order" else [1, 50]
        forge(store.path, documents)
    else:
        flipped = bytes([*data[:-4], data[-4] ^ 1, *data[-3:]])
        file.write_bytes({"flip": flipped, "cut": data[:-1], "grow": data + b" "}[damage])
    with pytest.raises(DatastoreError, match="removed-"):
        Datastore.open(store.path)


def forge(folder, documents):
    """A side file whose checksum is right and whose contents are not."""
    data = json.dumps({"format": "knnlm_hf removed documents", "documents": documents}).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / f"removed-{sha256[:16]}.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["removed"] = {"bytes": len(data), "sha256": sha256, "documents": len(documents)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
