"""Training on a datastore: against a known optimum, a plain loop, and itself after a kill."""

import math

import pytest
import tiny
import torch

from knnlm_hf import Datastore, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.entries import Entries
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.memory.training import train

FAST = {"epochs": 6, "batch_size": 64, "lr": 0.03, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(60), path, progress=False)


def mean_loss(head, store):
    keys, values = store.keys[:].float(), store.values.long()
    return -head.token_log_probs(keys, values).mean().item()


def test_every_entry_is_seen_once_an_epoch(store):
    entries = Entries(store, seed=3)
    held = torch.cat([tokens for _, tokens, _ in entries.held_out(50)])
    orders = []
    for epoch in (0, 1, 0):
        batches = list(entries.epoch(epoch, 50))
        assert {len(batch.tokens) for batch in batches[:-1]} == {50}
        orders.append(torch.cat([batch.tokens for batch in batches]))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    everything = torch.cat([orders[1], held]).sort().values
    assert torch.equal(everything, store.values.long().sort().values)
    keys, tokens, ids = next(entries.epoch(0, 5))
    assert torch.equal(store.keys[ids].float(), keys)
    for key, token in zip(keys, tokens, strict=True):  # a key keeps its own value
        same = (store.keys[:].float() == key).all(1).nonzero()[:, 0]
        assert token in store.values[same]


def test_a_store_smaller_than_a_batch(store):
    (batch,) = Entries(store, seed=0).epoch(0, 100_000)
    assert len(batch.tokens) == len(Entries(store, seed=0))
    small = {**FAST, "batch_size": 100_000, "epochs": 1}
    assert math.isfinite(MultiEmbeddingHead.train_on(store, n=1, **small).trained.held_out_loss)


def test_training_finds_the_unigram_optimum(tmp_path):
    """With constant keys the best head is the unigram distribution of the values."""
    store = Datastore.build(tiny.gpt2(), tiny.corpus(60), tmp_path / "s", progress=False)
    constant = torch.zeros(len(store), store.dim)
    constant[:, 0] = 1
    store.keys = type(store.keys)([constant])
    head = MultiEmbeddingHead.train_on(store, n=1, patience=20, **{**FAST, "epochs": 40})
    counts = store.values.bincount(minlength=tiny.VOCAB).double()
    p = counts / counts.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum().item()
    assert mean_loss(head, store) == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize("n", [1, 3])
def test_training_lowers_the_loss_and_is_deterministic(store, n):
    head = MultiEmbeddingHead.train_on(store, n=n, **FAST)
    assert mean_loss(head, store) < 0.6 * math.log(tiny.VOCAB)
    again = MultiEmbeddingHead.train_on(store, n=n, **FAST)
    assert torch.equal(head.weight, again.weight)
    other = MultiEmbeddingHead.train_on(store, n=n, **FAST, seed=1)
    assert not torch.equal(head.weight, other.weight)
    assert head.layer == "att"
    assert head.trained.entries == len(Entries(store, 0))
    assert not head.training


def test_bfloat16_trains_to_about_the_same(store):
    full = MultiEmbeddingHead.train_on(store, n=2, **FAST)
    half = MultiEmbeddingHead.train_on(store, n=2, **FAST, dtype="bfloat16")
    assert half.weight.dtype == torch.float32
    assert mean_loss(half, store) == pytest.approx(mean_loss(full, store), rel=0.1)


def test_a_killed_run_continues_to_the_same_weights(store, tmp_path, monkeypatch):
    whole = MultiEmbeddingHead.train_on(store, n=2, **FAST)
    killed_at = 3
    real = Entries.epoch

    def killed(self, number, batch_size):
        if number == killed_at:
            raise KeyboardInterrupt
        return real(self, number, batch_size)

    monkeypatch.setattr(Entries, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        MultiEmbeddingHead.train_on(store, n=2, checkpoint=tmp_path / "c", **FAST)
    monkeypatch.setattr(Entries, "epoch", real)
    with pytest.raises(KNNLMError, match="recipe"):
        MultiEmbeddingHead.train_on(store, n=2, checkpoint=tmp_path / "c", **FAST, seed=2)
    resumed = MultiEmbeddingHead.train_on(store, n=2, checkpoint=tmp_path / "c", **FAST)
    assert torch.equal(resumed.weight, whole.weight)
    # It stays until the head is saved: nothing is trained again.
    monkeypatch.setattr(Entries, "epoch", None)
    again = MultiEmbeddingHead.train_on(store, n=2, checkpoint=tmp_path / "c", **FAST)
    assert torch.equal(again.weight, whole.weight)
    assert again.trained == resumed.trained == whole.trained


def test_a_damaged_checkpoint_is_refused(store, tmp_path):
    train(MultiEmbeddingHead(24, 61), store, Recipe(epochs=2), checkpoint=tmp_path, progress=False)
    tensors = next(tmp_path.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(KNNLMError, match="damaged"):
        train(MultiEmbeddingHead(24, 61), store, Recipe(), checkpoint=tmp_path, progress=False)


def test_early_stopping_keeps_the_best(store):
    head = MultiEmbeddingHead.train_on(store, n=1, **{**FAST, "epochs": 50, "lr": 0.5}, patience=1)
    assert head.trained.epochs < 50
    entries = Entries(store, 0)
    with torch.no_grad():
        losses = [(head(k, v).item(), len(v)) for k, v, _ in entries.held_out(64)]
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert mean == pytest.approx(head.trained.held_out_loss, rel=1e-5)


def test_bad_input(store):
    for options in ({"epochs": 0}, {"lr": 0.0}, {"lr": -1}, {"dtype": "int8"}, {"patience": 0}):
        with pytest.raises(SettingError):
            MultiEmbeddingHead.train_on(store, progress=False, **options)
    with pytest.raises(SettingError, match="unknown setting learning_rate"):
        MultiEmbeddingHead.train_on(store, learning_rate=1)
    rows = [1] * tiny.VOCAB
    rows[int(store.values[0])] = 0
    with pytest.raises(KNNLMError, match="no row"):
        MultiEmbeddingHead.train_on(store, rows_per_token=rows, **FAST)
