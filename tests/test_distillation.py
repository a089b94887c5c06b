"""Distilling a head: the loss against its definition, and training against a known optimum."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNMemory, MultiEmbeddingHead, SoftTargets, distil
from knnlm_hf.errors import DatastoreError, KNNLMError, SettingError
from knnlm_hf.memory import CentroidMemory, MixtureOfSoftmaxes, MLPMemory
from knnlm_hf.memory.distillation import distilled_loss, mixed_targets
from knnlm_hf.memory.entries import Batch, Entries

FAST = {"epochs": 3, "batch_size": 64, "lr": 0.03, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("distillation") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(20), path, progress=False)


@pytest.fixture(scope="module")
def targets(store):
    return SoftTargets.build(store, teacher_of(store), tokens=6, progress=False)


def teacher_of(store, k=9):
    return KNNMemory(store, k=k, temperature=3.0, index="exact")


def heads(store):
    torch.manual_seed(0)
    sizes = store.dim, store.vocab_size
    centroids = CentroidMemory.train_on(store, clusters=9, progress=False)
    return [
        MultiEmbeddingHead(*sizes, n=2), MixtureOfSoftmaxes(*sizes, components=2),
        MLPMemory(*sizes, layers=1, width=8), centroids,
    ]  # fmt: skip


class FixedTargets:
    def __getitem__(self, ids):
        tokens = torch.tensor([[3, 1], [2, 0]])[ids]
        return tokens, torch.tensor([[0.75, 0.25], [0.0, 0.0]])[ids]


def test_the_mixed_targets_by_hand():
    batch = Batch(torch.zeros(2, 1), torch.tensor([1, 4]), torch.tensor([0, 1]))
    tokens, weights = mixed_targets(batch, FixedTargets(), 0.2)
    assert tokens.tolist() == [[1, 3, 1], [4, 4, 4]]
    assert weights[0].tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert weights[1].tolist() == [1.0, 0.0, 0.0]  # the teacher found nothing


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
def test_the_loss_is_its_definition_for_every_head(store, targets, alpha):
    ids = torch.tensor([0, 5, len(store) - 1, 7])
    batch = Batch(store.keys[ids].float(), store.values[ids].long(), ids)
    tokens, probs = targets[ids]
    for head in heads(store):
        loss, about = distilled_loss(head, store, targets, alpha)
        log_probs = head.log_probs(batch.keys).detach().double().numpy()
        expected = 0.0
        for q in range(4):
            own = -log_probs[q, batch.tokens[q]]
            of_teacher = -sum(
                p * log_probs[q, token]
                for p, token in zip(probs[q].tolist(), tokens[q].tolist(), strict=True)
                if p > 0
            )
            expected += (alpha * own + (1 - alpha) * of_teacher) / 4
        assert loss(batch).item() == pytest.approx(expected, rel=1e-5), type(head)
        assert about["alpha"] == alpha
        assert about["k"] == 9


def test_its_optimum_is_the_mean_of_the_targets(tmp_path):
    """With constant states the best distribution is α next tokens and 1−α teacher."""
    store = Datastore.build(tiny.gpt2(), tiny.corpus(20), tmp_path / "s", progress=False)
    targets = SoftTargets.build(store, teacher_of(store), progress=False)
    ids = torch.arange(len(store))
    tokens, probs = targets[ids]
    tokens = (tokens + 1) % tiny.VOCAB  # unlike the next tokens
    targets._tokens = type(targets._tokens)([tokens.to(torch.int16)])
    head = MultiEmbeddingHead(1, store.vocab_size, n=1)
    loss, _ = distilled_loss(head, store, targets, 0.25)
    batch = Batch(torch.ones(len(ids), 1), store.values.long(), ids)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        return value

    optimizer.step(closure)
    expected = np.zeros(store.vocab_size)
    np.add.at(expected, tokens.numpy(), 0.75 * probs.numpy() / len(ids))
    np.add.at(expected, store.values.numpy(), 0.25 / len(ids))
    got = head.log_probs(torch.ones(1, 1)).exp()[0]
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=5e-4)


def test_it_is_deterministic_and_remembers_its_teacher(store, targets):
    made = []
    for teacher in (targets, targets.path, str(targets.path)):
        torch.manual_seed(0)
        head = MLPMemory(store.dim, store.vocab_size, layers=1, dropout=0.2)
        distil(head, store, teacher, alpha=0.4, **FAST)
        made.append(head)
    for head in made[1:]:
        assert torch.equal(head.weight, made[0].weight)
    assert made[0].trained.teacher["alpha"] == 0.4
    assert made[0].trained.teacher["tokens"] == 6
    assert made[0].trained.held_out_loss < 0.8 * math.log(tiny.VOCAB)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MultiEmbeddingHead, {"n": 1}), (MixtureOfSoftmaxes, {"components": 2}),
        (MLPMemory, {"layers": 1}), (CentroidMemory, {"clusters": 9, "fine_tune": True}),
    ],
)  # fmt: skip
def test_every_head_can_be_trained_on_a_teacher(store, targets, kind, settings):
    ids, shifted = torch.arange(len(store)), copy.copy(targets)
    tokens, probs = targets[ids]
    tokens = (tokens + 1) % tiny.VOCAB  # unlike the next tokens, so that it shows who taught
    known = torch.isin(tokens, store.values)
    tokens = torch.where(known, tokens, store.values.long()[:, None])
    shifted._tokens = type(targets._tokens)([tokens.to(torch.int16)])
    head = kind.train_on(store, teacher=shifted, alpha=0.0, **settings, **FAST)
    plain = kind.train_on(store, **settings, **FAST)
    assert head.trained.teacher == {"alpha": 0.0, **targets.about()}
    assert plain.trained.teacher is None
    keys = store.keys[ids].float()
    assert head(keys, tokens, probs) < plain(keys, tokens, probs) - 0.1


def test_centroids_that_are_not_trained_take_no_teacher(store, targets):
    with pytest.raises(SettingError, match="fine_tune=True"):
        CentroidMemory.train_on(store, clusters=3, teacher=targets, progress=False)


def test_a_killed_run_continues_to_the_same_weights(store, targets, tmp_path, monkeypatch):
    def new():
        torch.manual_seed(0)
        return MLPMemory(store.dim, store.vocab_size, layers=1, dropout=0.2)

    whole, resumed = new(), new()
    distil(whole, store, targets, **FAST)
    real = Entries.epoch

    def killed(self, number, batch_size):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, batch_size)

    with monkeypatch.context() as patched:
        patched.setattr(Entries, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            distil(new(), store, targets, checkpoint=tmp_path / "c", **FAST)
    with pytest.raises(KNNLMError, match="teacher"):
        distil(new(), store, targets, 0.1, checkpoint=tmp_path / "c", **FAST)
    distil(resumed, store, targets, checkpoint=tmp_path / "c", **FAST)
    assert torch.equal(resumed.weight, whole.weight)


def test_the_neighbours_are_retrieved_once(store, monkeypatch, tmp_path):
    asked = []
    teacher = teacher_of(store, k=4)
    search = teacher.search
    monkeypatch.setattr(teacher, "search", lambda q, **o: asked.append(len(q)) or search(q, **o))
    monkeypatch.setattr(store, "path", tmp_path / "elsewhere")
    for _ in range(2):
        distil(MultiEmbeddingHead(store.dim, store.vocab_size, n=1), store, teacher, **FAST)
    assert sum(asked) == len(store)
    assert (tmp_path / "elsewhere.targets").is_dir()


def test_removed_documents_teach_nothing(tmp_path):
    documents = [[5, 6, 7, 6, 5, 7, 6], [8, 9, 8, 9, 8], [5, 7, 6, 5, 6, 7, 5]]
    store = Datastore.build(tiny.gpt2(), documents, tmp_path / "s", progress=False)
    before = SoftTargets.build(store, teacher_of(store), tmp_path / "before", progress=False)
    store.remove([1])
    with pytest.raises(DatastoreError, match="not the datastore to train on"):
        distil(MultiEmbeddingHead(24, tiny.VOCAB, n=1), store, before, **FAST)
    targets = SoftTargets.build(store, teacher_of(store, k=20), tmp_path / "t", progress=False)
    tokens, probs = targets[torch.arange(len(store))]
    assert set(tokens[probs > 0].tolist()) == {5, 6, 7}
    centroids = CentroidMemory.train_on(store, clusters=3, progress=False)
    assert centroids.token_starts.diff().nonzero()[:, 0].tolist() == [5, 6, 7]


def test_bad_input(store, targets, tmp_path):
    head = MultiEmbeddingHead(store.dim, store.vocab_size, n=1)
    for alpha in (-0.1, 1.1, "x", True, math.nan):
        with pytest.raises(SettingError, match="alpha"):
            distil(head, store, targets, alpha, **FAST)
    with pytest.raises(SettingError, match="expected a KNNMemory"):
        distil(head, store, head, **FAST)
    with pytest.raises(SettingError, match="unknown setting"):
        distil(head, store, targets, steps=3)
    with pytest.raises(DatastoreError, match="no such folder"):
        distil(head, store, tmp_path / "nothing", **FAST)
    other = Datastore.build(tiny.gpt2(1), tiny.corpus(8), tmp_path / "other", progress=False)
    with pytest.raises(DatastoreError, match="not the datastore to train on"):
        distil(head, other, targets, **FAST)
    assert head.trained is None
