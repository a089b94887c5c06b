"""Shards, manifest and reader, without a model: keys are numbers that say where they belong."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from knnlm_hf.datastore import DatastoreReader, Manifest, Rows, ShardText, StoreWriter
from knnlm_hf.datastore import reader as readers
from knnlm_hf.datastore.ledger import Ledger
from knnlm_hf.datastore.manifest import DATA_START, load
from knnlm_hf.errors import DatastoreError
from knnlm_hf.types import is_finite
from knnlm_hf.windows import Document

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODEL = {
    "id": None, "revision": None, "architecture": "GPT2LMHeadModel", "config": {}, "weights": {},
    "tokenizer": None,
}  # fmt: skip
ITEMS = [[], [5, 1, 2, 3], [7], [8, 9, 10, 11, 12, 13, 14], [], [20, 21], [30, 31, 32], [], [4]]
VALUES = [token for item in ITEMS for token in item[1:]]  # 12 of them


def manifest(**changes):
    settings = {
        "layer": "att", "dim": 3, "dtype": "float16", "vocab_size": 50, "window": 8, "stride": 4,
        "batch_size": 2, "shard_size": 5, "bos": False, "model": MODEL,
    }  # fmt: skip
    return Manifest(**{**settings, **changes})


def keys_for(m, n):
    return torch.arange(n * m.dim).view(n, m.dim).to(DTYPES[m.dtype])


def write(folder, items=ITEMS, **changes):
    m = manifest(**changes)
    folder.mkdir()
    m.save(folder)
    writer = StoreWriter(folder, m)
    ledger = Ledger(m.shard_size, lambda i, text: writer.put(text))
    for _ in ledger.read(Document(i, np.array(t, dtype=np.int32)) for i, t in enumerate(items)):
        pass
    keys = keys_for(m, ledger.entries)
    ledger.finish()
    for some in keys.split(4):
        writer.append(some)
    writer.finish(ledger.documents)
    return DatastoreReader.open(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shard_size", "dim"), [(1, 3), (3, 5), (4, 1), (12, 7), (100, 3)])
def test_what_is_written_is_read(tmp_path, dtype, shard_size, dim):
    store = write(tmp_path / "s", dtype=dtype, shard_size=shard_size, dim=dim)
    assert len(store) == 12
    assert store.dim == dim
    assert store.values.tolist() == VALUES
    assert store.values.dtype == torch.int32
    assert store.keys[:].dtype == store.dtype == DTYPES[dtype]
    assert torch.equal(store.keys[:], keys_for(store.manifest, 12))
    store.verify()
    # The real safetensors library reads the same.
    loaded = [load_file(tmp_path / "s" / shard.file) for shard in store.manifest.shards]
    assert torch.equal(torch.cat([part["keys"] for part in loaded]), store.keys[:])
    assert torch.cat([part["values"] for part in loaded]).tolist() == VALUES
    starts = torch.cat([part["document_starts"] for part in loaded])
    assert starts.tolist() == [0, 0, 3, 3, 9, 9, 10, 12, 12]
    rows = [len(part["values"]) for part in loaded]
    assert all(n == shard_size for n in rows[:-1])
    first = 0
    for n, part in zip(rows, loaded, strict=True):  # each start in the shard where it begins
        within = [s for s in part["document_starts"].tolist() if s != 12]
        assert all(first <= start < first + n for start in within)
        first += n


def test_documents_and_context(tmp_path):
    store = write(tmp_path / "s")
    owners = [i for i, item in enumerate(ITEMS) for _ in item[1:]]
    assert [store.document(i) for i in range(12)] == owners
    assert store.document(torch.tensor([[0, 9], [11, 3]])).tolist() == [[1, 5], [6, 3]]
    assert store.documents == len(ITEMS)
    for i, owner in enumerate(owners):
        text = ITEMS[owner][1:]
        at = i - owners.index(owner)
        for before, after in ((16, 8), (0, 0), (2, 1), (1, 0)):
            assert store.context(i, before, after) == text[max(0, at - before) : at + after + 1]
    for i in (-1, 12):
        with pytest.raises(IndexError):
            store.document(i)
        with pytest.raises(IndexError):
            store.context(i)


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [4, 3], [1] * 7])
def test_rows_are_one_array(sizes):
    whole = torch.arange(14.0).view(7, 2)
    rows = Rows(list(whole.split(sizes)))
    assert len(rows) == 7
    assert rows.shape == (7, 2)
    for i in range(-7, 7):
        assert torch.equal(rows[i], whole[i])
    for start in range(-8, 9):
        for stop in (None, *range(-8, 9)):
            assert torch.equal(rows[start:stop], whole[start:stop])
    for step in (2, 3):
        assert torch.equal(rows[1:7:step], whole[1:7:step])
    reverse = [6, 3, 3, 0]
    for ids in (reverse, np.array(reverse), torch.tensor(reverse), torch.tensor(reverse).int()):
        assert torch.equal(rows[ids], whole[reverse])
    square = torch.tensor([[6, 0, 3], [2, 2, 5]])
    assert torch.equal(rows[square], whole[square])
    assert rows[[]].shape == (0, 2)
    assert rows[torch.zeros(2, 0, dtype=torch.int64)].shape == (2, 0, 2)
    assert torch.equal(rows[torch.tensor(3)], whole[3])
    for size in (1, 2, 5, 100):
        blocks = list(rows.blocks(size))
        assert torch.equal(torch.cat([block for _, block in blocks]), whole)
        assert all(torch.equal(block, whole[at : at + len(block)]) for at, block in blocks)
        assert all(len(block) <= size for _, block in blocks)
    for bad in (7, -8, [0, 7], torch.tensor([-1]), [0.5], torch.tensor([True])):
        with pytest.raises(IndexError):
            rows[bad]


def test_reading_never_changes_the_file(tmp_path):
    store = write(tmp_path / "s", shard_size=100)
    store.keys[0:3].zero_()
    store.values.zero_()
    DatastoreReader.open(tmp_path / "s").verify()


def test_digest_identifies_the_contents(tmp_path):
    one = write(tmp_path / "a")
    assert one.digest == write(tmp_path / "b").digest
    assert one.digest != write(tmp_path / "c", items=[*ITEMS, [1, 2]]).digest
    assert one.digest != write(tmp_path / "d", dtype="float32").digest


def reshape_file(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(at):
    def change(data):
        data[at] ^= 1

    return change


@pytest.mark.parametrize("at", [DATA_START, DATA_START + 31, -1, -20])
def test_verify_names_the_shard_with_a_flipped_byte(tmp_path, at):
    store = write(tmp_path / "s")
    path = tmp_path / "s" / store.manifest.shards[1].file
    reshape_file(path, flip(at))
    with pytest.raises(DatastoreError, match=path.name):
        DatastoreReader.open(tmp_path / "s").verify()


@pytest.mark.parametrize(
    "change",
    [lambda d: d.pop(), lambda d: d.append(0), lambda d: d.clear(), flip(3), flip(40), flip(4000)],
)
def test_open_names_a_shard_of_the_wrong_size_or_header(tmp_path, change):
    store = write(tmp_path / "s")
    path = tmp_path / "s" / store.manifest.shards[2].file
    reshape_file(path, change)
    with pytest.raises(DatastoreError, match=path.name):
        DatastoreReader.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(DatastoreError, match=f"{path.name}.*missing"):
        DatastoreReader.open(tmp_path / "s")


def rehash(folder):
    """Make the manifest agree with the files, so that only their contents are wrong."""
    data = json.loads((folder / "manifest.json").read_text())
    for shard in data["shards"]:
        shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("keys", (1, 1), float("nan"), "NaN"),
        ("keys", (0, 2), float("inf"), "NaN or infinite"),
        ("values", 2, 50, "outside"),
        ("values", 0, -1, "outside"),
        ("document_starts", 0, 1, "document table"),
        ("document_starts", 1, 9, "document table"),
        ("document_starts", 3, 2, "document table"),
    ],
)
def test_verify_reads_the_contents_too(tmp_path, name, at, value, message):
    write(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors[name][at] = value
    parts = [tensors[n].numpy().tobytes() for n in ("keys", "values", "document_starts")]
    path.write_bytes(path.read_bytes()[:DATA_START] + b"".join(parts))
    rehash(tmp_path / "s")
    with pytest.raises(DatastoreError, match=f"{path.name}.*{message}"):
        DatastoreReader.open(tmp_path / "s").verify()


def edited(folder, edit):
    data = json.loads((folder / "manifest.json").read_text())
    edit(data)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DatastoreError) as caught:
        DatastoreReader.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_newer_version_is_refused(tmp_path):
    write(tmp_path / "s")
    message = edited(tmp_path / "s", lambda d: d.update(version=3))
    assert "version 3" in message
    assert "up to 2" in message


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors", 3, "x\n",
     "manifest.json", "C:x.safetensors", ".safetensors"],
)  # fmt: skip
def test_files_outside_the_store_are_refused(tmp_path, name):
    write(tmp_path / "s")
    message = edited(tmp_path / "s", lambda d: d["shards"][0].update(file=name))
    assert "inside the store" in message


@pytest.mark.parametrize("field", [*Manifest.__dataclass_fields__, "format", "version", "entries"])
def test_every_field_is_checked(tmp_path, field):
    write(tmp_path / "s")
    for value in (None, -1, "x" * 3, [1], {"a": 1}, 10**18):
        if (field, value) in (("subsample", None), ("layer", "xxx"), ("subsample", {"a": 1})):
            continue
        if (field, value) == ("removed", None):
            continue
        if field in ("window", "stride", "batch_size") and value == 10**18:
            continue
        if field == "shard_size" and value == -1:
            continue
        path = tmp_path / "s" / "manifest.json"
        original = path.read_bytes()
        assert edited(tmp_path / "s", lambda d, v=value: d.update({field: v}))
        path.write_bytes(original)
    if field not in ("removed", "appended"):  # which are not written where there are none
        edited(tmp_path / "s", lambda d: d.pop(field))


@pytest.mark.parametrize("field", ["file", "rows", "bytes", "sha256", "corpus"])
def test_every_field_of_a_shard_is_checked(tmp_path, field):
    write(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    original = path.read_bytes()
    for value in (None, -1, 0, "x" * 3, [1], 10**18, True):
        edited(tmp_path / "s", lambda d, v=value: d["shards"][1].update({field: v}))
        path.write_bytes(original)
    edited(tmp_path / "s", lambda d: d["shards"][1].pop(field))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', "\xff"])
def test_a_manifest_that_is_none(tmp_path, text):
    write(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DatastoreError, match=r"manifest\.json"):
        load(tmp_path / "s")


def test_an_unfinished_store_is_refused(tmp_path):
    store = write(tmp_path / "s")
    replace(store.manifest, complete=False, shards=store.manifest.shards[:1]).save(tmp_path / "s")
    with pytest.raises(DatastoreError, match=r"unfinished \(5 entries.*resume"):
        DatastoreReader.open(tmp_path / "s")


def test_a_folder_without_a_store(tmp_path):
    with pytest.raises(DatastoreError, match="no datastore"):
        DatastoreReader.open(tmp_path)


def test_the_hub_is_asked_for_the_manifest_first(tmp_path, monkeypatch):
    store = write(tmp_path / "s")
    calls = []

    def download(source, repo_type, *, allow_patterns=None, **options):
        calls.append((source, repo_type, allow_patterns, options["revision"]))
        return tmp_path / ("s" if source == "me/store" else "other")

    monkeypatch.setattr(readers, "local_folder", download)
    (tmp_path / "other").mkdir()
    assert DatastoreReader.open("me/store", revision="v1").digest == store.digest
    assert calls == [
        ("me/store", "dataset", ["manifest.json"], "v1"),
        ("me/store", "dataset", None, "v1"),
    ]
    calls.clear()
    with pytest.raises(DatastoreError, match="no datastore"):
        DatastoreReader.open("me/other")
    assert len(calls) == 1


def test_push_leaves_the_lock_and_unfinished_files_behind(tmp_path, monkeypatch):
    store = write(tmp_path / "s")
    calls = []
    monkeypatch.setattr(readers, "push_folder", lambda *a, **k: calls.append((a, k)) or "url")
    assert store.push_to_hub("me/store", private=True) == "url"
    ((args, options),) = calls
    assert args == (tmp_path / "s", "me/store", "dataset")
    assert options["private"] is True
    assert {".lock", "*.tmp"} <= set(options["ignore_patterns"])


def test_writer_removes_what_it_does_not_finish(tmp_path):
    m = manifest()
    writer = StoreWriter(tmp_path, m)
    writer.put(ShardText(np.zeros(5, np.int32), np.zeros(1, np.int64), "0" * 64))
    writer.append(keys_for(m, 4))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_saved_by_someone_else_is_refused(tmp_path):
    store = write(tmp_path / "s")
    path = tmp_path / "s" / store.manifest.shards[0].file
    save_file(load_file(path), path)
    with pytest.raises(DatastoreError, match=path.name):
        DatastoreReader.open(tmp_path / "s")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype):
    assert is_finite(torch.empty(0, 4, dtype=dtype))
    values = torch.randn(300, 70).to(dtype)
    values[0, 0] = torch.finfo(dtype).max
    assert is_finite(values)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for row, column in ((0, 0), (17, 33), (299, 69)):
            spoilt = values.clone()
            spoilt[row, column] = bad
            assert not is_finite(spoilt)
