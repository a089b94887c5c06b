"""The race of a grid on a sample: what it leaves out is not the best."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tuning import several, table

from knnlm_hf.tuning import descent, fit
from knnlm_hf.tuning.race import contenders, sample

KS, TS = [1, 4, 12], [10 * 2 ** (step / 3) for step in range(-15, 15)]
LS = [i / 20 for i in range(20)]
CANDIDATES = [(a, b, c) for a in (0, 0.2) for b in (0.1, 0.3) for c in (0, 0.3)]


def gains_of(scores, lmbdas=LS, temperatures=TS, ks=KS):
    """Mean log-likelihood over the model's own, {(λ, t, k): nats}, in float64 by numpy alone."""
    lm = np.exp(scores.lm_log_probs.double().numpy())
    (found,) = scores.memories
    similarity, is_target = found.similarity.double().numpy(), found.is_target.numpy()
    alive = similarity[:, 0] > -math.inf
    relative = similarity[alive] - similarity[alive, :1]
    gains = {}
    for t in temperatures:
        weights = np.exp(relative / t)
        for k in ks:
            carried = (weights[:, :k] * is_target[alive, :k]).sum(1)
            knn = carried / weights[:, :k].sum(1)
            for lmbda in lmbdas:
                mixed = np.log((1 - lmbda) + lmbda * knn / lm[alive])
                gains[lmbda, t, k] = mixed.sum() / len(lm)
    return gains


@pytest.fixture
def looked_at(monkeypatch):
    """How many tokens and temperatures were looked at, each time."""
    calls, usual = [], descent.knn_probabilities

    def counting(found, ks, temperatures, match_weight=0.0):
        calls.append((len(found.similarity), len(temperatures)))
        return usual(found, ks, temperatures, match_weight)

    monkeypatch.setattr(descent, "knn_probabilities", counting)
    return calls


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_of_the_grid_wins_and_most_of_it_is_never_looked_at_whole(seed, looked_at):
    scores = table(seed, n=12_000, k=12)
    best = fit(scores, ks=KS, temperatures=TS, lmbdas=LS)
    gains = gains_of(scores)
    assert max(gains, key=gains.get) == (best.lmbda, best.temperature, best.k)
    (sampled, every), (whole, running) = looked_at
    assert (sampled, every, whole) == (2_400, len(TS), 12_000)
    assert running < len(TS) * 2 / 3


def test_the_race_is_the_same_with_the_exact_share(looked_at):
    scores = table(3, n=12_000, k=12)
    best = fit(scores, ks=KS, temperatures=TS)
    gains = gains_of(scores, lmbdas=[best.lmbda], temperatures=TS)
    assert (best.temperature, best.k) == max(gains, key=gains.get)[1:]
    assert looked_at[0][0] < 12_000 < 2 * looked_at[0][0] * len(TS)


@pytest.mark.parametrize("lmbdas", [None, CANDIDATES])
def test_several_memories_race_one_by_one(lmbdas, monkeypatch, looked_at):
    scores = several(0, n=12_000)
    raced = fit(scores, lmbdas=lmbdas)
    assert min(tokens for tokens, _ in looked_at) < 12_000
    monkeypatch.setattr(descent, "sample", lambda count: None)
    whole = fit(scores, lmbdas=lmbdas)
    assert (raced.temperature, raced.k) == (whole.temperature, whole.k)
    assert raced.lmbda == pytest.approx(whole.lmbda, abs=1e-3)
    assert raced.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


@pytest.mark.parametrize("lmbdas", [None, CANDIDATES])
def test_what_is_raced_is_the_gain_of_the_mixture(lmbdas, monkeypatch):
    raced, usual = [], descent.Descent._grid

    def keeping(self, *args):
        for found in usual(self, *args):
            raced.append(found)
            yield found

    monkeypatch.setattr(descent.Descent, "_grid", keeping)
    fit(several(0, n=12_000), lmbdas=lmbdas)
    gains = [found.mixed.double().log().mean().item() for found in raced]
    assert gains == pytest.approx([found.gain for found in raced], rel=1e-4, abs=1e-6)
    assert {len(found.mixed) for found in raced} == {2_400, 12_000}


def test_a_sample_is_one_of_every_few_tokens_and_has_no_period():
    assert sample(0) is None
    assert sample(10_239) is None
    for count in (10_240, 20_000, 285_001, 10_000_000):
        rows, step = sample(count), count // 2_048
        assert 2_048 <= len(rows) < 2_500
        assert (rows // step == torch.arange(len(rows))).all()
        assert rows[-1] < count
        assert torch.equal(rows, sample(count))
    every = torch.bincount(sample(20_000) % 45, minlength=45)
    assert every.min() > 0


def records(n=20_000, length=45, k=8):
    """The fifth token of every record has a far neighbour, and needs it; the others near ones."""
    generator = torch.Generator().manual_seed(0)
    similarity = -torch.rand(n, k, generator=generator).sort(1).values / 2
    similarity[:, -1] = -100
    is_target = torch.arange(k) == torch.randint(k - 1, (n, 1), generator=generator)
    lm = -6 - 2 * torch.rand(n, generator=generator)
    fifth = torch.arange(n) % length == 4
    is_target[fifth], lm[fifth] = torch.arange(k) == k - 1, -20.0
    scores = table(0, n=n, k=k)
    found = replace(scores.memories[0], similarity=similarity, is_target=is_target)
    return replace(scores, lm_log_probs=lm, memories=(found,))


@pytest.mark.parametrize("temperatures", [None, [1.0, 10.0, 100.0, 1000.0]])
def test_records_of_a_fixed_length_do_not_deceive(temperatures, monkeypatch):
    scores = records()
    raced = fit(scores, temperatures=temperatures)
    monkeypatch.setattr(descent, "sample", lambda count: None)
    whole = fit(scores, temperatures=temperatures)
    assert (raced.temperature, raced.k) == (whole.temperature, whole.k)


def test_what_is_not_a_number_stays_in_the_running():
    values = torch.zeros(3, 100)
    values[1, 0] = math.nan
    values[2] -= 1
    assert contenders(values).tolist() == [True, True, True]
    assert contenders(torch.full((2, 100), -math.inf)).tolist() == [True, True]


def test_contenders_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 500, generator=generator) * 3
    log_likelihood = common + 0.1 * torch.randn(40, 500, generator=generator)
    log_likelihood -= torch.linspace(0, 0.1, 40)[:, None]
    values = log_likelihood.double().numpy()
    best = values[values.mean(1).argmax()]
    expected = []
    for row in values:
        behind = best - row
        error = math.sqrt(((behind - behind.mean()) ** 2).sum() / 499 / 500)
        expected.append(bool(behind.mean() <= max(6 * error, 1e-3)))
    assert contenders(log_likelihood).tolist() == expected
    assert 1 < sum(expected) < 40


def test_equals_and_a_hair_s_breadth_stay_in_the_running():
    alike = torch.zeros(3, 100)
    assert contenders(alike).tolist() == [True, True, True]
    alike[1] -= 9e-4
    alike[2] -= 11e-4
    assert contenders(alike).tolist() == [True, True, False]
