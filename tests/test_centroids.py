"""CentroidMemory against loops in float64; built by hand, from a store, and trained."""

import math

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNLMForCausalLM
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import centroids as module
from knnlm_hf.memory import soft_counts
from knnlm_hf.memory.centroids import CentroidMemory
from knnlm_hf.memory.entries import Entries

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("centroids") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(40), path, progress=False)


def array(tensor):
    return tensor.detach().double().numpy()


def made(centroids, distributions, temperature=1.0, mass=None):
    """A memory with these centroids (J, D) and distributions (J, V)."""
    distributions = torch.as_tensor(distributions)
    pairs = (distributions > 0).T.nonzero()  # by token, then by centroid
    head = CentroidMemory(
        len(centroids[0]), distributions.shape[1], len(centroids), temperature=temperature,
        pairs=len(pairs),
    )  # fmt: skip
    head.centroids.data = torch.as_tensor(centroids).float()
    head.log_mass.data = torch.zeros(len(centroids)) if mass is None else torch.as_tensor(mass)
    head.log_weights.data = distributions.T[pairs[:, 0], pairs[:, 1]].log().float()
    head.pair_centroids = pairs[:, 1].to(torch.int32)
    head.token_starts = torch.searchsorted(
        pairs[:, 0].contiguous(), torch.arange(distributions.shape[1] + 1)
    )
    return head.eval()


def random_head(seed=0, clusters=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(clusters, 7, generator=generator) + 0.01
    weights[torch.rand(clusters, 7, generator=generator) < 0.5] = 0
    weights[:, 3], weights[:, 5], weights[0, 0] = 0, 0.2, 0.5  # nobody has 3, everybody has 5
    centroids = torch.randn(clusters, 4, generator=generator)
    mass = torch.randn(clusters, generator=generator)
    return made(centroids, weights / weights.sum(1, keepdim=True), 2.0, mass).to(dtype)


def loop(head, hidden):
    """p(w|h), centroid by centroid."""
    centroids, mass, logs = array(head.centroids), array(head.log_mass), array(head.log_weights)
    starts, of_pair = head.token_starts.tolist(), head.pair_centroids.tolist()
    result = np.zeros((len(hidden), head.vocab_size))
    for q, h in enumerate(array(hidden)):
        far = np.square(centroids - h).sum(1)
        shares = np.exp(mass - (far - far.min()) / head.temperature)
        shares /= shares.sum()
        for token in range(head.vocab_size):
            for pair in range(starts[token], starts[token + 1]):
                result[q, token] += shares[of_pair[pair]] * math.exp(logs[pair])
    return result


def test_two_centroids_by_hand():
    head = made([[0.0], [2.0]], [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], temperature=math.log(3) ** -1)
    # At h = ½ the squared distances are ¼ and 9/4: odds 3² : 1.
    got = head.log_probs(torch.tensor([[0.5]])).exp()[0]
    assert got.tolist() == pytest.approx([0.45, 0.475, 0.075])


@pytest.mark.parametrize("training", [False, True])
def test_against_the_loop(training):
    head = random_head().train(training)
    hidden = torch.randn(9, 4)
    expected = loop(head, hidden)
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-6)
    got = head.log_probs(hidden)
    np.testing.assert_allclose(array(got.exp()), expected, rtol=1e-4, atol=1e-8)
    assert ((got == -math.inf).numpy() == (expected == 0)).all()
    tokens = torch.arange(9) % 7
    one = head.token_log_probs(hidden, tokens)
    torch.testing.assert_close(one, got[torch.arange(9), tokens])
    known = tokens != 3
    loss = head(hidden[known], tokens[known])
    assert loss.item() == pytest.approx(-one[known].mean().item(), rel=1e-5)


def test_a_token_far_away_is_not_lost():
    head = made([[0.0], [30.0]], [[1.0, 0.0], [0.0, 1.0]])
    got = head.token_log_probs(torch.zeros(1, 1), torch.tensor([1]))
    assert got.item() == pytest.approx(-900, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_against_autograd(chunk, soft, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    head = random_head(dtype=torch.float64).train()
    tokens = torch.tensor([[0, 5, 5], [6, 1, 0], [5, 4, 2], [2, 2, 1]])
    tokens = tokens if soft else tokens[:, 0]
    weights = torch.rand(4, 3, dtype=torch.float64) if soft else None

    def plain(states, tokens, weights):
        far = torch.cdist(states, head.centroids).square()
        shares = (head.log_mass - far / head.log_temperature.exp()).softmax(1)
        dense = torch.zeros(head.clusters, 7, dtype=torch.float64)
        token_of_pair = torch.arange(7).repeat_interleave(head.token_starts.diff())
        dense = dense.index_put((head.pair_centroids.long(), token_of_pair), head.log_weights.exp())
        probs = shares @ (dense / dense.sum(1, keepdim=True))
        if weights is None:
            return -probs.gather(1, tokens[:, None]).log().mean()
        return -(weights * probs.gather(1, tokens).log()).sum(1).mean()

    hidden, results = torch.randn(4, 4, dtype=torch.float64), []
    for function in (head, plain):
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = function(states, tokens, weights)
        loss.backward()
        results.append([loss.detach(), states.grad, *(p.grad.clone() for p in head.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_in_float64():
    head = random_head(dtype=torch.float64).train()
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*head.named_parameters(), strict=True)

    def loss(states, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, replaced, (states, torch.tensor([0, 5, 6])))

    assert torch.autograd.gradcheck(loss, (hidden, *values))
    assert torch.autograd.gradcheck(lambda h: head.log_probs(h).exp(), (hidden,))


def counted(store, head, weights, temperature, prior):
    """(J, V) distributions and (J,) m from the store, entry by entry, given the centroids."""
    entries, keys, centroids = Entries(store, 0), array(store.keys[:]), array(head.centroids)
    values = store.values.tolist()
    held = set(entries.held_out_ids.tolist())
    others = {values[i] for i in range(len(store)) if i not in held}
    result, counts = np.zeros((len(centroids), store.vocab_size)), np.zeros(len(centroids))
    for i in range(len(store)):
        if i in held and values[i] in others:
            continue
        far = np.square(keys[i] - centroids).sum(1)
        j = far.argmin()
        a = {"counts": 1, "inverse": far[j] ** -0.5, "softmax": math.exp(-far[j] / temperature)}
        result[j, values[i]] += a[weights]
        counts[j] += 1
    mass = np.log(counts) if prior == "counts" else np.zeros(len(counts))
    return result / result.sum(1, keepdims=True), mass


@pytest.mark.parametrize("weights", ["counts", "inverse", "softmax"])
@pytest.mark.parametrize("prior", ["counts", "uniform"])
def test_made_from_a_store(store, weights, prior, monkeypatch):
    monkeypatch.setattr(soft_counts, "_HELD", 100)
    head = CentroidMemory.train_on(
        store, clusters=30, weights=weights, prior=prior, temperature=50.0, **QUIET
    )
    expected, mass = counted(store, head, weights, 50.0, prior)
    got = np.zeros_like(expected)
    token_of_pair = torch.arange(store.vocab_size).repeat_interleave(head.token_starts.diff())
    got[head.pair_centroids.numpy(), token_of_pair.numpy()] = array(head.log_weights.exp())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(array(head.log_mass), mass, rtol=1e-6)
    assert head.temperature == pytest.approx(50.0)
    assert head.clusters == 30
    assert head.trained.epochs == 0
    held = [(head(k, v).item(), len(v)) for k, v, _ in Entries(store, 0).held_out(64)]
    mean = sum(loss * n for loss, n in held) / sum(n for _, n in held)
    assert head.trained.held_out_loss == pytest.approx(mean, rel=1e-5)


def test_the_temperature_is_the_best_for_held_out_entries(store):
    head = CentroidMemory.train_on(store, clusters=30, **QUIET)
    losses = []
    for factor in (0.5, 1, 2):
        other = CentroidMemory.train_on(
            store, clusters=30, temperature=head.temperature * factor, **QUIET
        )
        losses.append(other.trained.held_out_loss)
    assert losses[1] == pytest.approx(head.trained.held_out_loss, rel=1e-4)
    assert losses[1] < min(losses[0], losses[2])
    assert head.trained.held_out_loss < 0.8 * math.log(tiny.VOCAB)


def test_one_centroid_is_the_unigram_distribution(store):
    head = CentroidMemory.train_on(store, clusters=1, **QUIET)
    counts = store.values[Entries(store, 0).trained_ids].bincount(minlength=tiny.VOCAB)
    got = head.log_probs(torch.randn(2, 24)).exp()
    torch.testing.assert_close(got, (counts / counts.sum()).expand(2, -1), rtol=1e-3, atol=1e-4)


def test_a_token_that_only_a_held_out_entry_has_is_known(tmp_path):
    once = [[token] * 2 for token in range(tiny.VOCAB)]  # every token follows once
    store = Datastore.build(tiny.gpt2(), once, tmp_path / "s", progress=False)
    assert len(Entries(store, 0).held_out_ids) > 0
    head = CentroidMemory.train_on(store, clusters=4, **QUIET)
    assert head.token_starts.diff().tolist() == [1] * tiny.VOCAB
    assert math.isfinite(head.trained.held_out_loss)


def test_more_clusters_than_entries(store):
    head = CentroidMemory.train_on(store, clusters=5 * len(store), iterations=2, **QUIET)
    assert head.clusters <= len(store)
    assert set(head.pair_centroids.tolist()) == set(range(head.clusters))
    torch.testing.assert_close(
        head.log_probs(store.keys[:5].float()).exp().sum(1), torch.ones(5), rtol=1e-4, atol=0
    )


def test_training_lowers_the_loss_and_is_deterministic(store):
    options = {"clusters": 20, "epochs": 4, "batch_size": 64, "lr": 0.02, **QUIET}
    before = CentroidMemory.train_on(store, **options)
    head, again = (CentroidMemory.train_on(store, fine_tune=True, **options) for _ in range(2))
    assert head.trained.held_out_loss < before.trained.held_out_loss
    assert head.trained.epochs > 0
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    moved = {n for n, p in head.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {"centroids", "log_mass", "log_weights", "log_temperature"}
    total = torch.zeros(20).index_add(0, head.pair_centroids.long(), head.log_weights.exp())
    torch.testing.assert_close(total, torch.ones(20))  # still distributions
    keys, tokens = store.keys[:50].float(), store.values[:50].long()
    loss = head(keys, tokens)
    assert loss.item() == pytest.approx(-head.token_log_probs(keys, tokens).mean().item(), rel=1e-5)


def test_the_temperature_can_be_set():
    head = random_head()
    head.temperature = 7.5
    assert head.temperature == pytest.approx(7.5)
    for wrong in (0, -1, math.inf, "x"):
        with pytest.raises(SettingError, match="temperature"):
            head.temperature = wrong


def test_bad_input(store):
    for options in (
        {"clusters": 0}, {"iterations": 0}, {"per_cluster": 0}, {"weights": "mean"},
        {"prior": "flat"}, {"temperature": 0},
    ):  # fmt: skip
        with pytest.raises(SettingError, match=next(iter(options))):
            CentroidMemory.train_on(store, **options, **QUIET)
    head = random_head()
    with pytest.raises(KNNLMError, match="token 3"):
        head(torch.zeros(2, 4), torch.tensor([0, 3]))
    with pytest.raises(KNNLMError, match="3-d"):
        head.log_probs(torch.zeros(1, 3))


def test_one_that_knows_nothing_leaves_its_share_to_the_model():
    model = tiny.gpt2()
    blank = CentroidMemory(model.config.n_embd, model.config.vocab_size, layer="final")
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    with torch.no_grad():
        mixed = KNNLMForCausalLM(model, blank, lmbda=0.25)(ids).logits
        expected = model(ids).logits.log_softmax(-1)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
