"""Sampled softmax and the start at a model's rows, against the exact loss and by hand."""

import math

import pytest
import tiny
import torch

from knnlm_hf import CentroidMemory, Datastore, MixtureOfSoftmaxes, MLPMemory, MultiEmbeddingHead
from knnlm_hf.errors import ModelMismatchError, SettingError
from knnlm_hf.memory.sampled_loss import sampled_loss, taken_in

RAGGED = [1, 3, 0, 2, 5, 1, 1]


def test_a_drawn_token_stands_for_the_rest_by_hand():
    # 7 tokens, 2 of them targets; 2 of the other 5 are drawn and count 2.5 each.
    tokens, log_counts = taken_in(torch.tensor([[4], [1], [4]]), 7, 2)
    assert tokens[:2].tolist() == [1, 4]
    assert len(set(tokens.tolist())) == 4
    assert log_counts.exp().tolist() == pytest.approx([1, 1, 2.5, 2.5])
    tokens, log_counts = taken_in(torch.tensor([[4], [1]]), 7, 99)
    assert sorted(tokens.tolist()) == list(range(7))
    assert log_counts.tolist() == [0] * 7
    tokens, _ = taken_in(torch.arange(7)[:, None], 7, 3)
    assert tokens.tolist() == list(range(7))


@pytest.mark.parametrize("rows", [None, RAGGED])
@pytest.mark.parametrize("bias", [True, False])
def test_with_all_tokens_drawn_it_is_the_exact_loss(rows, bias):
    torch.manual_seed(0)
    head = MultiEmbeddingHead(5, 7, 2, rows_per_token=rows, bias=bias)
    hidden = torch.randn(9, 5)
    tokens = torch.tensor([0, 1, 1, 3, 4, 5, 6, 1, 0])
    results = []
    for negatives in (None, 7):
        head.negatives = negatives
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = head.train()(states, tokens)
        loss.backward()
        results.append([loss.detach(), states.grad, *(p.grad.clone() for p in head.parameters())])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("make", [MixtureOfSoftmaxes, MLPMemory])
def test_other_heads_too_have_the_exact_loss_with_all_tokens_drawn(make):
    torch.manual_seed(0)
    head = make(5, 7).train()
    hidden, tokens = torch.randn(9, 5), torch.randint(7, (9, 2))
    weights = torch.rand(9, 2)
    results = []
    for negatives in (None, 7):
        head.negatives = negatives
        head.zero_grad()
        loss = head(hidden, tokens, weights)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in head.parameters())])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_sampled_mixture_of_softmaxes_by_its_definition():
    torch.manual_seed(0)
    head = MixtureOfSoftmaxes(5, 40, components=3).double().train()
    head.negatives = 6
    hidden, tokens = torch.randn(8, 5, dtype=torch.float64), torch.randint(40, (8,))
    torch.manual_seed(1)
    loss = head(hidden, tokens)
    ours = torch.autograd.grad(loss, list(head.parameters()))
    torch.manual_seed(1)
    taken, log_counts = taken_in(tokens[:, None], 40, 6)
    assert len(taken) < 16
    total = torch.zeros((), dtype=torch.float64)
    for state, token in zip(hidden, tokens, strict=True):
        prior = (head.prior.weight @ state).softmax(0)
        parts = torch.tanh(head.latent.weight @ state + head.latent.bias).view(3, 5)
        weighted = (parts @ head.weight[taken].T + log_counts).exp()
        own = (parts @ head.weight[token]).exp() / weighted.sum(1)
        total = total - (prior * own).sum().log() / len(hidden)
    torch.testing.assert_close(loss, total)
    reference = torch.autograd.grad(total, list(head.parameters()))
    torch.testing.assert_close(ours, reference)


def test_the_denominator_is_right_on_average():
    torch.manual_seed(0)
    hidden, rows = torch.randn(1, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    tokens = torch.tensor([[3]])
    own = float(hidden @ rows[3])
    sizes = {"vocab_size": 30, "negatives": 6}
    sums = []
    for _ in range(3000):
        loss = sampled_loss(hidden, rows, None, lambda t: t[..., None], tokens, None, **sizes)
        sums.append(math.exp(float(loss) + own))
    exact = float((hidden @ rows.T).exp().sum())
    deviation = torch.tensor(sums).std().item() / math.sqrt(len(sums))
    assert abs(sum(sums) / len(sums) - exact) < 5 * deviation
    assert deviation > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(60), path, progress=False)


@pytest.mark.parametrize("kind", [MultiEmbeddingHead, MLPMemory, MixtureOfSoftmaxes])
def test_a_head_learns_from_few_negatives(kind, store):
    options = {"lr": 0.05, "batch_size": 64, "patience": 9, "progress": False}
    before = kind.train_on(store, epochs=1, **options | {"lr": 1e-9})
    after = kind.train_on(store, epochs=6, negatives=5, **options)
    assert after.trained.held_out_loss < before.trained.held_out_loss - 0.5
    assert after.negatives is None
    again = kind.train_on(store, epochs=6, negatives=5, **options)
    assert torch.equal(after.weight, again.weight)


def test_a_head_starts_at_the_models_rows(store):
    model = tiny.gpt2()
    options = {"epochs": 1, "lr": 1e-12, "progress": False, "start": model}
    rows = model.get_output_embeddings().weight.detach()
    for head in (
        MLPMemory.train_on(store, **options),
        MultiEmbeddingHead.train_on(store, 1, **options),
    ):
        scale = head.weight / rows
        torch.testing.assert_close(scale, scale.median().expand_as(scale), rtol=1e-3, atol=1e-3)
    apart = MultiEmbeddingHead.train_on(store, 2, **options).weight.view(tiny.VOCAB, 2, -1)
    assert not torch.allclose(apart[:, 0], apart[:, 1])
    cosine = torch.cosine_similarity(apart[:, 0], rows, dim=1)
    assert cosine.min() > 0.95


def test_bad_input(store):
    with pytest.raises(SettingError, match="negatives is 0"):
        MultiEmbeddingHead.train_on(store, negatives=0)
    with pytest.raises(SettingError, match="CentroidMemory has no sampled loss"):
        CentroidMemory.train_on(store, clusters=4, fine_tune=True, negatives=3, progress=False)
    with pytest.raises(SettingError, match="'mixture_of_softmaxes' cannot start from a model"):
        MixtureOfSoftmaxes.train_on(store, start=tiny.gpt2(), progress=False)
    with pytest.raises(ModelMismatchError):
        MultiEmbeddingHead.train_on(store, start=tiny.gpt2(seed=1), progress=False)
