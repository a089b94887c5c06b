"""Built indexes on disk: found again, refused when they do not fit, never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import Keys

from knnlm_hf.errors import KNNLMError, SearchIndexError
from knnlm_hf.index import (
    ExactIndex,
    build_index,
    built_indexes,
    faiss_files,
    open_index,
    wrap_index,
)

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def keys():
    return Keys(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).half())


def build(folder, keys, spec="Flat", **options):
    options = {"digest": "abc", "progress": False, **options}
    return build_index(
        keys, torch.arange(len(keys), dtype=torch.int32) % 7, folder, spec, **options
    )


def the_file(folder):
    (path,) = folder.glob("*/*.faiss")
    return path


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "spec",
    ["exact", "Flat", "IVF4,Flat", "IVF4,PQ8x4fs,Refine(keys)", "IVF4,SQ8", "HNSW8", "PQ8x4",
     "Pad20,IVF4,PQ5x4fs", "IVF4,PQ8x4fs,Refine(SQ8)", "RR18,IVF4,PQ9x4fsr"],
)  # fmt: skip
def test_opened_is_what_was_built(tmp_path, keys, spec, metric):
    built = build(tmp_path, keys, spec, metric=metric)
    for asked in ("auto", spec):
        opened = open_index(keys, tmp_path, spec=asked, metric=metric, digest="abc")
        assert type(opened) is type(built)
        assert opened.info == built.info
        assert len(opened) == 300
        for mine, theirs in zip(
            opened.search(keys[:9].float(), 20), built.search(keys[:9].float(), 20), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_the_record_is_complete(tmp_path, keys):
    info = build(tmp_path, keys, "IVF4,SQ8", nprobe=3, seed=5).info
    stored = json.loads((the_file(tmp_path).parent / "index.json").read_text())
    size = the_file(tmp_path).stat().st_size
    assert (info.bytes, info.bytes_per_entry) == (size, size / 300)
    expected = {"format": 1, "spec": "IVF4,SQ8", "factory": "IVF4,SQ8", "metric": "l2", "dim": 16,
                "entries": 300, "digest": "abc", "nprobe": 3, "seed": 5, "bytes": size,
                "faiss_version": faiss.__version__}  # fmt: skip
    assert {name: stored[name] for name in expected} == expected
    assert stored["self_check"]["temperature"] == info.temperature > 0
    assert open_index(keys, tmp_path, digest="abc").nprobe == 3
    record = the_file(tmp_path).parent / "index.json"
    record.write_text(json.dumps(stored | {"nprobe": 2}))
    assert open_index(keys, tmp_path, digest="abc").nprobe == 2


def test_nothing_built_is_none(tmp_path, keys):
    assert open_index(keys, tmp_path / "indexes", digest="abc") is None
    assert open_index(keys, tmp_path, spec="Flat", digest="abc") is None
    assert isinstance(open_index(keys, tmp_path, spec="exact", digest="abc"), ExactIndex)


def test_auto_is_the_newest_of_its_metric(tmp_path, keys):
    build(tmp_path, keys, "Flat")
    build(tmp_path, keys, "IVF4,Flat")
    build(tmp_path, keys, "SQ8", metric="ip")
    assert open_index(keys, tmp_path, digest="abc").info.factory == "IVF4,Flat"
    build(tmp_path, keys, "Flat")
    assert open_index(keys, tmp_path, digest="abc").info.factory == "Flat"
    assert [info.factory for _, info in built_indexes(tmp_path)] == ["IVF4,Flat", "SQ8", "Flat"]


def test_auto_keeps_a_record_of_exact_search(tmp_path, keys):
    index = build(tmp_path, keys, "auto")
    assert index.info.factory == "exact"
    assert index.temperature > 0
    assert open_index(keys, tmp_path, digest="abc").temperature == index.temperature
    assert open_index(keys, tmp_path, spec="exact", digest="other").info is None


def test_another_metric_or_spec_is_named_not_used(tmp_path, keys):
    build(tmp_path, keys, "Flat", metric="ip")
    for spec in ("auto", "Flat"):
        with pytest.raises(SearchIndexError, match=r"only Flat \(ip\)"):
            open_index(keys, tmp_path, spec=spec, metric="l2", digest="abc")
    with pytest.raises(SearchIndexError, match=r"no index for SQ8 \(ip\)"):
        open_index(keys, tmp_path, spec="SQ8", metric="ip", digest="abc")


def test_older_than_its_store(tmp_path, keys):
    build(tmp_path, keys, "Flat")
    with pytest.raises(SearchIndexError, match=r"older than its store.*rebuild"):
        open_index(keys, tmp_path, digest="xyz")
    with pytest.raises(SearchIndexError, match=r"300 entries.*has 200"):
        open_index(Keys(keys.rows[:200]), tmp_path, digest="abc")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_file_never_reaches_faiss(tmp_path, keys, damage, monkeypatch):
    build(tmp_path, keys, "Flat")
    path = the_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if damage == "cut" else data)
    monkeypatch.setattr(faiss, "read_index", None)
    reason = {"flip": "checksum", "cut": "bytes, expected", "remove": "missing"}[damage]
    with pytest.raises(SearchIndexError, match=reason):
        open_index(keys, tmp_path, digest="abc")


@pytest.mark.parametrize(
    "change",
    [
        "not json",
        "[]",
        {"entries": "300"},
        {"sha256": "../../etc/passwd"},
        {"metric": "cosine"},
        {"format": 99},
        {"dim": None},
        {"self_check": {"temperature": float("nan")}},
    ],
)
def test_damaged_record(tmp_path, keys, change):
    build(tmp_path, keys, "Flat")
    path = the_file(tmp_path).parent / "index.json"
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_text(change)
    with pytest.raises(KNNLMError, match=r"index\.json"):
        open_index(keys, tmp_path, digest="abc")


def test_a_record_that_lies_about_its_file(tmp_path, keys):
    build(tmp_path, keys, "Flat")
    path = the_file(tmp_path).parent / "index.json"
    other = Keys(keys.rows[:, :8])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dim": 8}))
    with pytest.raises(SearchIndexError, match=r"16-d.*expected 300 8-d"):
        open_index(other, tmp_path, digest="abc")


def test_rebuilding_replaces(tmp_path, keys):
    build(tmp_path, keys, "IVF4,SQ8", seed=0)
    old = the_file(tmp_path)
    build(tmp_path, keys, "IVF4,SQ8", seed=1)
    assert the_file(tmp_path) != old
    assert open_index(keys, tmp_path, digest="abc").info.seed == 1


def test_a_build_that_fails_leaves_the_old_index(tmp_path, keys, monkeypatch):
    build(tmp_path, keys, "IVF4,SQ8", seed=0)
    before = sorted(tmp_path.rglob("*"))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faiss_files, "write", lambda index, path: full(path))
    with pytest.raises(SearchIndexError, match=r"cannot write the index.*No space left"):
        build(tmp_path, keys, "IVF4,SQ8", seed=1)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda old, new: full(new))
    with pytest.raises(SearchIndexError, match="No space left"):
        build(tmp_path, keys, "IVF4,SQ8", seed=1)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert open_index(keys, tmp_path, digest="abc").info.seed == 0


def test_nothing_to_index(tmp_path):
    with pytest.raises(SearchIndexError, match="no entries"):
        build(tmp_path, Keys(torch.empty(0, 4)))


def test_wrap_index(keys):
    own = faiss.IndexFlatL2(16)
    own.add(keys.rows.float().numpy())
    assert wrap_index(own, "l2", entries=300, dim=16).metric == "l2"
    exact = ExactIndex(keys, "ip")
    assert wrap_index(exact, "ip", entries=300, dim=16) is exact
    for metric, entries, dim in (("ip", 300, 16), ("l2", 299, 16), ("l2", 300, 8)):
        with pytest.raises(SearchIndexError, match="build it"):
            wrap_index(own, metric, entries=entries, dim=dim)
    with pytest.raises(SearchIndexError, match="index is int"):
        wrap_index(3, "l2", entries=300, dim=16)


def test_progress_is_one_line(tmp_path, keys, capsys):
    build(tmp_path, keys, "Flat", progress=True)
    printed = capsys.readouterr()
    assert "Flat (l2)" in printed.out + printed.err
    assert "recall@299" in printed.out + printed.err


def test_importing_does_not_load_faiss():
    code = "import sys, knnlm_hf.index; assert 'faiss' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
