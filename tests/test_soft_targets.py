"""SoftTargets against brute force in float64, and after a kill, a change and damage."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNMemory
from knnlm_hf.datastore.atomic import TEMPORARY
from knnlm_hf.errors import DatastoreError, SettingError
from knnlm_hf.memory import soft_targets as module
from knnlm_hf.memory.soft_targets import SoftTargets, most_probable
from knnlm_hf.types import Neighbors

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(8), path, progress=False)


def teacher_of(store, **options):
    return KNNMemory(store, **{"k": 9, "temperature": 3.0, "index": "exact", **options})


def brute_force(store, k, t):
    """(N, V): the kNN distribution of every entry, without the entry."""
    keys, values = store.keys[:].double().numpy(), store.values.numpy()
    result = np.zeros((len(keys), store.vocab_size))
    for i, key in enumerate(keys):
        far = np.square(keys - key).sum(1)
        far[i] = math.inf
        near = np.argsort(far, kind="stable")[:k]
        weights = np.exp(-(far[near] - far[near[0]]) / t)
        for j, weight in zip(near, weights / weights.sum(), strict=True):
            result[i, values[j]] += weight
    return result


def test_three_neighbours_by_hand():
    near = Neighbors(
        torch.log(torch.tensor([[4.0, 3.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0]])),
        torch.tensor([[7, 8, 9, 6], [1, -1, -1, -1]]),
        torch.tensor([[2, 0, 2, 1], [3, -1, -1, -1]]),
    )
    near = near._replace(similarity=near.similarity.masked_fill(near.ids < 0, -math.inf))
    tokens, probs, kept = most_probable(near, 1.0, 5, 2)
    assert tokens[0].tolist() == [2, 0]  # 0.6 and 0.3 of 1; 0.1 is shared out
    assert probs[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert kept.tolist() == pytest.approx([0.9, 1.0])
    assert probs[1].tolist() == [1.0, 0.0]
    assert tokens[1].tolist() == [3, 3]


def test_a_query_without_a_hit_has_nothing():
    nothing = torch.full((1, 3), -1)
    near = Neighbors(torch.full((1, 3), -math.inf), nothing, nothing)
    _, probs, kept = most_probable(near, 1.0, 5, 2)
    assert probs.tolist() == [[0.0, 0.0]]
    assert kept.tolist() == [0.0]


@pytest.mark.parametrize("shard_size", [50, 10_000])
def test_against_brute_force(store, tmp_path, shard_size):
    targets = SoftTargets.build(
        store, teacher_of(store), tmp_path / "t", tokens=9, shard_size=shard_size, batch_size=17,
        **QUIET,
    )  # fmt: skip
    expected = brute_force(store, 9, 3.0)
    tokens, probs = targets[torch.arange(len(store))]
    got = np.zeros_like(expected)
    np.put_along_axis(got, tokens.numpy(), 0.0, 1)
    np.add.at(got, (np.arange(len(store))[:, None], tokens.numpy()), probs.numpy())
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)  # float16
    assert targets.kept == pytest.approx(1.0)
    ids = torch.tensor([len(store) - 1, 0, 3, 3])
    for ours, all_of_them in zip(targets[ids], (tokens, probs), strict=True):
        assert torch.equal(ours, all_of_them[ids])
    assert len(targets) == len(store)
    targets.verify()


def test_the_most_probable_are_kept_and_renormalised(store, tmp_path):
    targets = SoftTargets.build(store, teacher_of(store), tmp_path / "t", tokens=2, **QUIET)
    expected = np.sort(brute_force(store, 9, 3.0), 1)[:, :-3:-1]
    _, probs = targets[torch.arange(len(store))]
    normalised = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(probs.numpy(), normalised, rtol=2e-3, atol=1e-5)
    assert targets.kept == pytest.approx(expected.sum(1).mean(), rel=1e-4)
    assert targets.kept < 0.999
    assert targets.about()["kept"] == targets.kept


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_large_vocabularies(store, tmp_path, vocab_size, monkeypatch):
    """Tokens above 2¹⁵ would be negative in int16; above 2¹⁶ they need more."""
    model = tiny.gpt2(vocab_size=vocab_size)
    text = [[1, vocab_size - 1, 40_000, vocab_size - 1, 40_000, 2, vocab_size - 1]]
    large = Datastore.build(model, text, tmp_path / "s", progress=False)
    monkeypatch.setattr(module, "_DISTRIBUTION", 1)
    targets = SoftTargets.build(large, teacher_of(large, k=5), tokens=3, **QUIET)
    tokens, probs = targets[torch.arange(len(large))]
    assert set(tokens[probs > 0].tolist()) == {2, 40_000, vocab_size - 1}
    assert targets.path.name == "s.targets"


def killed_after(monkeypatch, shards):
    real, done = module.append_shard, []

    def append(*args):
        if len(done) == shards:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(module, "append_shard", append)


def test_a_killed_build_continues_to_the_same_bytes(store, tmp_path, monkeypatch):
    options = {"tokens": 4, "shard_size": 60, "batch_size": 25, **QUIET}
    whole = SoftTargets.build(store, teacher_of(store), tmp_path / "whole", **options)
    assert len(whole.manifest.shards) > 2
    with monkeypatch.context() as patched:
        killed_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            SoftTargets.build(store, teacher_of(store), tmp_path / "t", **options)
    with pytest.raises(DatastoreError, match=r"unfinished \(120 of"):
        SoftTargets.open(tmp_path / "t")
    (tmp_path / "t" / f"targets-00002.safetensors{TEMPORARY}").write_bytes(b"half")
    asked = []
    teacher = teacher_of(store)
    search = teacher.search
    monkeypatch.setattr(teacher, "search", lambda q, **o: asked.append(len(q)) or search(q, **o))
    SoftTargets.build(store, teacher, tmp_path / "t", **options)
    assert sum(asked) == len(store) - 120
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "t" / file.name).read_bytes() == file.read_bytes()
    asked.clear()
    SoftTargets.build(store, teacher, tmp_path / "t", **options)
    assert not asked
    assert {f.name for f in (tmp_path / "t").iterdir()} == {
        f.name for f in (tmp_path / "whole").iterdir()
    }


def test_another_teacher_or_store_is_refused(store, tmp_path):
    SoftTargets.build(store, teacher_of(store), tmp_path / "t", **QUIET)
    for options in ({"k": 8}, {"temperature": 2.0}, {"metric": "ip"}, {"rescore": True}):
        with pytest.raises(DatastoreError, match="teacher"):
            SoftTargets.build(store, teacher_of(store, **options), tmp_path / "t", **QUIET)
    with pytest.raises(DatastoreError, match="tokens 32, expected 5"):
        SoftTargets.build(store, teacher_of(store), tmp_path / "t", tokens=5, **QUIET)
    other = Datastore.build(tiny.gpt2(1), tiny.corpus(8), tmp_path / "other", progress=False)
    with pytest.raises(DatastoreError, match="not the datastore to train on"):
        SoftTargets.build(other, teacher_of(store), tmp_path / "u", **QUIET)
    assert not (tmp_path / "u").exists()


def damage(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(version=2),
        lambda m: m.update(entries="many"),
        lambda m: m.update(tokens=7),
        lambda m: m.pop("store"),
        lambda m: m.update(shards=3),
        lambda m: m["shards"][0].update(file="../store/x.safetensors"),
        lambda m: m["shards"][0].update(rows=3),
        lambda m: m["shards"][0].update(bytes=9),
        lambda m: m["shards"].append(m["shards"][0]),
    ],
)
def test_a_damaged_manifest_is_refused(store, tmp_path, change):
    SoftTargets.build(store, teacher_of(store), tmp_path / "t", tokens=3, **QUIET)
    damage(tmp_path / "t", change)
    with pytest.raises(DatastoreError, match="t/"):
        SoftTargets.open(tmp_path / "t")


def test_damaged_files_are_refused(store, tmp_path):
    targets = SoftTargets.build(store, teacher_of(store), tmp_path / "t", tokens=3, **QUIET)
    path = tmp_path / "t" / "targets-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # the old bytes are still mapped
    path.write_bytes(data)
    with pytest.raises(DatastoreError, match="checksum"):
        targets.verify()
    path.write_bytes(data[:-5])
    with pytest.raises(DatastoreError, match="bytes"):
        SoftTargets.open(tmp_path / "t")
    path.write_bytes(bytes(len(data)))
    with pytest.raises(DatastoreError, match="is damaged"):
        SoftTargets.open(tmp_path / "t")
    path.unlink()
    with pytest.raises(DatastoreError, match="missing"):
        SoftTargets.open(tmp_path / "t")
    with pytest.raises(DatastoreError, match="no such folder"):
        SoftTargets.open(tmp_path / "nothing")


def test_bad_settings(store, tmp_path):
    for options in ({"tokens": 0}, {"shard_size": 0}, {"batch_size": 0}):
        with pytest.raises(SettingError, match=next(iter(options))):
            SoftTargets.build(store, teacher_of(store), tmp_path / "t", **options, **QUIET)
    assert not (tmp_path / "t").exists()
