"""Files from a stranger: whatever they say, one clear refusal, or nothing that harms.

Hypothesis writes the files; the checks are that only `KNNLMError` comes out, in one line, that no
file outside the folder is opened, and that memory stays small whatever a header claims.
"""

import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import stores
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from knnlm_hf import Datastore, Head, KNNMemory, MultiEmbeddingHead
from knnlm_hf.cli import app
from knnlm_hf.errors import DatastoreError, KNNLMError, SearchIndexError
from knnlm_hf.index import faiss_files

faiss = pytest.importorskip("faiss")

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1, 2**31, 10**15, 10**30]),
    st.floats(), st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "..", "a/b.safetensors", "\x1b[2J", "[red]", "é\n"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with indexes and removed documents, and a head."""
    folder = tmp_path_factory.mktemp("hostile")
    store = stores.random(folder / "s", lengths=(6,) * 8, shard_size=20)
    for spec in ("exact", "Flat", "IVF2,Flat"):
        store.build_index(spec, progress=False)
    store.remove([2])
    MultiEmbeddingHead(16, 50, n=2, layer="att").save_pretrained(folder / "head")
    return folder


def read_all(folder):
    """All that a user's first minute does with a store from somewhere."""
    store = Datastore.open(folder)
    for i in (0, len(store) - 1):
        store.document(i)
    store.verify()
    for spec in ("auto", "exact", "IVF2,Flat"):
        memory = KNNMemory(store, k=2, index=spec)
        near = memory.search(torch.zeros(1, store.dim))
        assert not bool(store.removed and store.removed.covers(near.ids[near.ids >= 0]).any())
        assert memory.temperature > 0


def read_head(folder):
    Head.from_pretrained(folder).log_probs(torch.zeros(1, 16))


def refused_or_fine(read, folder):
    """Whether it was refused; in one line of moderate length, by an error of ours."""
    try:
        read(folder)
    except KNNLMError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert len(message) < 2000
    return True


def places(value, path=()):
    """Where a JSON value could be changed."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


RECORDS = ["s/manifest.json", "s/indexes/l2-Flat/index.json", "s/indexes/l2-exact/index.json",
           "s/removed", "head/config.json"]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
@quick
@given(data=st.data())
def test_any_json_in_place_of_any_part(home, record, data):
    if record == "s/removed":
        (file,) = (home / "s").glob("removed-*.json")
    else:
        file = home / record
    before, manifest = file.read_bytes(), (home / "s" / "manifest.json").read_bytes()
    content = json.loads(before)
    place = data.draw(st.sampled_from(list(places(content))))
    text = json.dumps(replaced(content, place, data.draw(JSON))).encode()
    renamed = file
    try:
        file.write_bytes(text)
        if record == "s/removed":  # a stranger's checksum is right
            forged = json.loads(manifest)
            sha256 = hashlib.sha256(text).hexdigest()
            forged["removed"] |= {"bytes": len(text), "sha256": sha256}
            (home / "s" / "manifest.json").write_text(json.dumps(forged))
            renamed = file.rename(file.with_name(f"removed-{sha256[:16]}.json"))
        read, folder = (read_head, "head") if "head" in record else (read_all, "s")
        refused_or_fine(read, home / folder)
    finally:
        if renamed != file:
            renamed.unlink()
        file.write_bytes(before)
        (home / "s" / "manifest.json").write_bytes(manifest)


@pytest.mark.parametrize("record", [*RECORDS[:3], RECORDS[4]])
@quick
@given(junk=st.binary(max_size=200))
def test_any_bytes_in_place_of_a_record(home, record, junk):
    file = home / record
    before = file.read_bytes()
    try:
        file.write_bytes(junk)
        assert refused_or_fine(*((read_head, home / "head") if "head" in record else
                                 (read_all, home / "s")))  # fmt: skip
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00002.safetensors"])
@quick
@given(data=st.data())
def test_any_header_of_a_shard(home, name, data):
    file = home / "s" / name
    before = file.read_bytes()
    length = struct.unpack("<Q", before[:8])[0]
    header = json.loads(before[8 : 8 + length])
    changed = data.draw(st.sampled_from(list(places(header))))
    text = json.dumps(replaced(header, changed, data.draw(JSON))).encode()[:length]
    claimed = data.draw(st.sampled_from([length, 0, 1, 2**40, 2**64 - 1]))
    forged = struct.pack("<Q", claimed) + text.ljust(length) + before[8 + length :]
    try:
        file.write_bytes(forged)
        assert refused_or_fine(read_all, home / "s") or forged == before
    finally:
        file.write_bytes(before)


@quick
@given(at=st.floats(0, 0.999), new=st.binary(min_size=1, max_size=16))
def test_any_faiss_file_with_its_checksum_right(tmp_path_factory, home, at, new):
    """FAISS is the one parser of binary files that is not ours: it must refuse, not crash."""
    folder = tmp_path_factory.mktemp("faiss")
    index = faiss.index_factory(16, "IVF2,Flat")
    keys = torch.randn(90, 16, generator=torch.Generator().manual_seed(0)).numpy()
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(folder / "i"))
    whole = bytearray((folder / "i").read_bytes())
    place = int(at * 400)  # the header and the quantiser's
    whole[place : place + len(new)] = new
    (folder / "i").write_bytes(whole)
    refused_or_fine(faiss_files.read, folder / "i")


def limited(code, *args, gigabytes=4):
    """Run code in a process that may not use more memory than that beyond its libraries."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30,) * 2),
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_header_that_claims_too_much_allocates_nothing(home, tmp_path):
    """Rows, width, documents and lists of 10^12 and more, in files of a few kilobytes."""
    rows = 10**15
    for name, change in {
        "rows": lambda d: (d["shards"][0].update(rows=rows), d.update(shard_size=rows)),
        "bytes": lambda d: d["shards"][0].update(
            rows=rows, bytes=4096 + rows * (16 * 4 + 4)
        ) or d.update(shards=d["shards"][:1], shard_size=rows, entries=rows, documents=0),
        "dim": lambda d: d.update(dim=10**12),
        "vocabulary": lambda d: d.update(vocab_size=10**12),
    }.items():  # fmt: skip
        shutil.copytree(home / "s", tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        change(manifest)
        del manifest["removed"]
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    index = faiss.index_factory(16, "IVF2,Flat")
    faiss.write_index(index, str(tmp_path / "index"))
    data = bytearray((tmp_path / "index").read_bytes())
    at = data.index(struct.pack("<Q", 2), 40)  # the number of lists
    data[at : at + 8] = struct.pack("<Q", 1 << 38)
    (tmp_path / "index").write_bytes(data)
    printed = limited(
        """
import sys
from pathlib import Path
from knnlm_hf import Datastore, KNNLMError
from knnlm_hf.index import faiss_files
home = Path(sys.argv[1])
for name in ("rows", "bytes", "dim", "vocabulary"):
    try:
        Datastore.open(home / name)
    except KNNLMError as error:
        print("refused", error)
try:
    faiss_files.read(home / "index")
except KNNLMError as error:
    print("refused", error)
""",
        tmp_path,
    )
    assert printed.count("refused") == 5, printed


@pytest.mark.parametrize("what", ["shard", "manifest", "removed", "index", "record"])
def test_links_out_of_the_folder(home, tmp_path, what):
    """A link may lead around in the folder and to the Hub's blobs, and nowhere else."""
    snapshot = tmp_path / "datasets--me--s" / "snapshots" / "abc"
    shutil.copytree(home / "s", snapshot)
    pattern = {
        "shard": "shard-00001*", "manifest": "manifest.json", "removed": "removed-*",
        "index": "indexes/l2-IVF2-Flat/*.faiss", "record": "indexes/l2-Flat/index.json",
    }  # fmt: skip
    (file,) = snapshot.glob(pattern[what])
    blobs = tmp_path / "datasets--me--s" / "blobs"
    for place, is_fine in ((blobs, True), (snapshot / "indexes", True), (tmp_path / "else", False)):
        place.mkdir(exist_ok=True)
        shutil.move(file, place / "moved")
        file.symlink_to(place / "moved")
        refused = refused_or_fine(read_all, snapshot)
        if what not in ("index", "record") or place != snapshot / "indexes":
            assert refused != is_fine, place
        file.unlink()
        shutil.move(place / "moved", file)
    read_all(snapshot)


def test_pipes_and_folders_are_no_files(home, tmp_path):
    shutil.copytree(home / "s", tmp_path / "s")
    for name in ("shard-00000.safetensors", "manifest.json"):
        (tmp_path / "s" / name).unlink()
        os.mkfifo(tmp_path / "s" / name)
        with pytest.raises(DatastoreError):  # and does not wait for someone to write
            Datastore.open(tmp_path / "s")
        (tmp_path / "s" / name).unlink()
        (tmp_path / "s" / name).mkdir()
        with pytest.raises(DatastoreError):
            Datastore.open(tmp_path / "s")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("s", "head"):
        shutil.copytree(home / folder, folder)
        for file in sorted(f for f in Path(folder).rglob("*") if f.is_file()):
            before = file.read_bytes()
            file.write_bytes(pickle.dumps(Bomb()))
            refused_or_fine(read_all if folder == "s" else read_head, Path(folder))
            file.write_bytes(before)
    assert not Path("exploded").exists()


def test_lists_in_another_file_are_not_followed(tmp_path):
    """FAISS can keep lists in a file that the index names by its path."""
    index = faiss.index_factory(16, "IVF2,Flat")
    keys = torch.randn(90, 16).numpy()
    index.train(keys)
    lists = faiss.OnDiskInvertedLists(2, index.code_size, str(tmp_path / "elsewhere"))
    index.replace_invlists(lists)
    index.add(keys)
    (tmp_path / "i").mkdir()
    faiss.write_index(index, str(tmp_path / "i" / "index"))
    with pytest.raises(SearchIndexError):
        faiss_files.read(tmp_path / "i" / "index")


WORDS = [
    "info", "verify", "index", "remove", "append", "compact", "build", "eval", "push", "--json",
    "--k", "-1", "nan", "", "0", "--metric", "cosine", "--help", "--nprobe", "é", "[x]", "--lmbda",
    "1e999", "./no/such", "\x00",
]  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=5), here=st.booleans())
def test_any_arguments(home, words, here):
    """An exit code and a line; never a traceback."""
    args = [*words[:1], *([str(home / "s")] if here else []), *words[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(home)
        result = CliRunner().invoke(app, args)
    assert result.exit_code in (0, 1, 2), (args, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (args, result)
