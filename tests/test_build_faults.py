"""Builds that are killed, interrupted, locked out or without a disk: nothing lost, same bytes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from knnlm_hf import Datastore
from knnlm_hf.datastore import atomic
from knnlm_hf.errors import CorpusError, DatastoreError, ModelMismatchError

ITEMS = tiny.corpus(seed=3)


def build(path, model=None, items=ITEMS, **options):
    settings = {"window": 16, "stride": 6, "batch_size": 3, "shard_size": 50, "progress": False}
    return Datastore.build(model or tiny.gpt2(), items, path, **{**settings, **options})


def contents(path):
    files = (file for file in Path(path).rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s"
    build(path)
    return contents(path)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = Path(__file__).parent
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(folder / "killed_builds.py"), str(tmp_path_factory.mktemp("killed"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_any_moment_a_build_resumes_to_the_same_bytes(killed):
    assert killed["shards"] >= 3
    assert killed["events"] > 10 * killed["shards"]
    assert killed["wrong"] == []


def test_a_full_disk_is_one_line_and_resumable(killed):
    assert killed["full"] == {"status": 3, "left": [], "same": True}


def fail_at(monkeypatch, count, error):
    """Make the count-th write of a shard raise `error`."""
    left = [count]
    real = atomic.write_all

    def write(file, data):
        left[0] -= 1
        if left[0] == 0:
            raise error
        real(file, data)

    monkeypatch.setattr(atomic, "write_all", write)


@pytest.mark.parametrize("count", [1, 4, 12, 20])
def test_no_space_left(tmp_path, monkeypatch, whole, count):
    with monkeypatch.context() as patch:
        fail_at(patch, count, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DatastoreError, match=r"cannot write.*No space left") as caught:
            build(tmp_path / "s")
    assert "\n" not in str(caught.value)
    if (tmp_path / "s").exists():
        assert not [name for name in contents(tmp_path / "s") if name.endswith(".tmp")]
    build(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_ctrl_c_leaves_a_resumable_store(tmp_path, whole):
    def interrupted():
        yield from ITEMS[:-1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", items=interrupted())
    assert any(name.startswith("shard-") for name in contents(tmp_path / "s"))
    with pytest.raises(DatastoreError, match=r"unfinished.*resume"):
        Datastore.open(tmp_path / "s")
    build(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


@pytest.fixture
def unfinished(tmp_path):
    """A store with its first shards only, as a corpus leaves it whose 8th document is bad."""
    with pytest.raises(CorpusError, match="outside"):
        build(tmp_path / "s", items=[*ITEMS[:-1], [1, 99]])
    return tmp_path / "s"


def test_finished_shards_cost_no_forward(unfinished, whole, monkeypatch):
    calls, block = [], GPT2Block.forward

    def counted(*args, **kwargs):  # not a hook: a model with one is read in larger batches
        calls.append(1)
        return block(*args, **kwargs)

    monkeypatch.setattr(GPT2Block, "forward", counted)
    counts = []
    for path in (unfinished.with_name("t"), unfinished):
        calls.clear()
        build(path)
        assert contents(path) == whole
        counts.append(len(calls))
    assert 0 < counts[1] <= counts[0] / 2


def test_resuming_with_anything_else_is_refused(unfinished):
    before = contents(unfinished)
    with pytest.raises(ModelMismatchError, match="weights changed"):
        build(unfinished, tiny.gpt2(seed=1))
    with pytest.raises(DatastoreError, match=r"batch_size 3.* 4"):
        build(unfinished, batch_size=4)
    with pytest.raises(DatastoreError, match="corpus is not"):
        build(unfinished, items=ITEMS[::-1])
    with pytest.raises(DatastoreError, match="ends after"):
        build(unfinished, items=ITEMS[:4])
    with pytest.raises(DatastoreError, match="delete it"):
        build(unfinished, resume=False)
    assert contents(unfinished) == before


@pytest.mark.parametrize("shard_size", [9, 29, 261])  # the entries fill the last shard exactly
def test_documents_without_entries_at_the_end_of_a_full_shard(tmp_path, shard_size):
    items = [*ITEMS, [], [3], []]
    options = {"shard_size": shard_size, "batch_size": 2}
    store = build(tmp_path / "whole", items=items, **options)
    assert {shard.rows for shard in store.manifest.shards} == {shard_size}
    assert store.documents == len(items)
    store.verify()

    def interrupted():
        yield from items
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", items=interrupted(), **options)
    build(tmp_path / "s", items=items, **options)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    build(tmp_path / "s", items=items, **options)
    with pytest.raises(DatastoreError, match="documents are divided"):
        build(tmp_path / "s", items=items[:-1], **options)


def test_a_damaged_shard_is_found_before_resuming(unfinished):
    shard = unfinished / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DatastoreError, match=shard.name):
        build(unfinished)
    shard.unlink()
    with pytest.raises(DatastoreError, match=shard.name):
        build(unfinished)


def test_two_builds_at_once(tmp_path, whole):
    (tmp_path / "s").mkdir()
    with (
        FileLock(tmp_path / "s" / ".lock"),
        pytest.raises(DatastoreError, match="another process is building"),
    ):
        build(tmp_path / "s")
    build(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_a_read_only_place(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(DatastoreError, match=r"cannot write.*Permission denied"):
            build(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", refuse)
        with pytest.raises(DatastoreError, match=r"cannot write.*Permission denied"):
            build(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(DatastoreError, match="cannot write"):
        build(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "mine"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatastoreError, match=r"notes\.txt.*no datastore"):
        build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["notes.txt"]
