"""Tuning against an exhaustive loop in float64 over the same grid."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, tune
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores
from knnlm_hf.tuning import fit


def table(seed=0, n=301, k=50, hit_share=0.1, dead=0.03):
    generator = torch.Generator().manual_seed(seed)
    similarity = -100 * torch.rand(n, k, generator=generator)
    similarity[torch.rand(n, k, generator=generator) < 0.05] = -math.inf
    similarity[torch.rand(n, generator=generator) < dead] = -math.inf
    similarity = similarity.sort(1, descending=True).values
    nearer_hits = torch.linspace(4 * hit_share, 0, k)
    is_target = torch.rand(n, k, generator=generator) < nearer_hits
    return TokenScores(
        lm_log_probs=-4 * torch.rand(n, generator=generator),
        tokens=torch.zeros(n, dtype=torch.int32),
        documents=torch.zeros(n, dtype=torch.int32),
        context=torch.ones(n, dtype=torch.int32),
        memories=(
            Evidence(
                similarity=similarity,
                is_target=is_target & (similarity > -math.inf),
                temperature=10.0,
            ),
        ),
        lmbdas=(0.0,),
    )


def loop_perplexity(scores, lmbda, t, k):
    total = 0.0
    lm = scores.lm_log_probs.double().numpy()
    (found,) = scores.memories
    for n in range(len(scores)):
        row = found.similarity[n, :k].double().numpy()
        if row[0] == -math.inf:
            total += lm[n]
            continue
        weights = np.exp((row - row[0]) / t)
        p = weights[found.is_target[n, :k].numpy()].sum() / weights.sum()
        total += math.log((1 - lmbda) * math.exp(lm[n]) + lmbda * p)
    return math.exp(-total / len(scores))


KS, TS, LS = [1, 3, 20, 50], [0.5, 5.0, 9.0, 10.0, 40.0, 80.0], [0.0, 0.05, 0.2, 0.35, 0.6, 0.95]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_grid_against_the_loop(seed):
    scores = table(seed)
    every = {(loop_perplexity(scores, lm, t, k), lm, t, k) for lm in LS for t in TS for k in KS}
    best = fit(scores, ks=KS, temperatures=TS, lmbdas=LS)
    value, lmbda, t, k = min(every)
    assert (best.lmbda, best.temperature, best.k) == (lmbda, t, k)
    assert best.perplexity == pytest.approx(value, rel=1e-5)
    assert best.perplexity == pytest.approx(scores.perplexity(lmbda, t, k), rel=1e-5)
    assert best.base_perplexity == pytest.approx(scores.base_perplexity)


def test_a_geometric_grid_squares_weights_without_losing_digits():
    scores = table(2)
    temperatures = [10 * 2 ** (step / 3) for step in range(-15, 15)]
    for t in temperatures[::4]:
        best = fit(scores, ks=[50], temperatures=temperatures, lmbdas=[0.3])
        one = fit(scores, ks=[50], temperatures=[t], lmbdas=[0.3])
        assert one.perplexity == pytest.approx(loop_perplexity(scores, 0.3, t, 50), rel=1e-5)
        assert best.perplexity <= one.perplexity * (1 + 1e-6)


def test_without_a_grid_lambda_is_the_exact_optimum():
    scores = table(3)
    best = fit(scores)
    assert best.perplexity == pytest.approx(
        scores.perplexity(best.lmbda, best.temperature, best.k), rel=1e-5
    )
    for change in (-0.02, 0.02):
        lmbda = min(0.99, max(0.0, best.lmbda + change))
        assert scores.perplexity(lmbda, best.temperature, best.k) > best.perplexity
    grid = fit(scores, ks=KS, temperatures=TS, lmbdas=LS)
    assert best.perplexity <= grid.perplexity * (1 + 1e-3)


def test_a_memory_that_does_not_help_is_said_to():
    scores = table(4)
    (found,) = scores.memories
    nothing = replace(found, is_target=torch.zeros_like(found.is_target))
    useless = replace(scores, memories=(nothing,))
    best = fit(useless)
    assert best.lmbda == 0
    assert not best.helps
    assert "does not help" in best.message
    assert best.perplexity == pytest.approx(useless.base_perplexity)


def test_a_memory_without_search_has_only_lambda():
    n = 200
    half = torch.where(torch.arange(n) < n // 2, math.log(0.9), -math.inf)
    scores = TokenScores(
        lm_log_probs=torch.full((n,), math.log(0.1)), tokens=torch.zeros(n),
        documents=torch.zeros(n), context=torch.ones(n),
        memories=(Evidence(scores=half),), lmbdas=(0.0,),
    )  # fmt: skip
    best = fit(scores)
    # Half at log(0.1 + 0.8 λ), half at log(0.1 (1−λ)): derivative zero at λ = (0.8 − 0.1) / 1.6.
    assert best.lmbda == pytest.approx(0.4375, abs=1e-3)
    assert (best.k, best.temperature) == (None, None)


@pytest.fixture(scope="module")
def knn(tmp_path_factory):
    model = tiny.gpt2()
    path = tmp_path_factory.mktemp("tuning") / "store"
    store = Datastore.build(model, tiny.corpus(20), path, progress=False)
    return KNNLMForCausalLM(model, KNNMemory(store, k=64), lmbda=0.1)


def test_tune_applies_what_it_finds(knn):
    held_out = tiny.corpus(seed=7)
    best = tune(knn, held_out, apply=False, progress=False)
    assert (knn.lmbda, knn.memory.k) == (0.1, 64)
    assert best.perplexity < best.base_perplexity
    assert best == tune(knn, held_out, progress=False)
    assert (knn.lmbda, knn.memory.k) == (best.lmbda, best.k)
    assert knn.memory.temperature == best.temperature
    knn.memory.k = 64


def test_tune_warns_when_it_does_not_help(knn, caplog):
    noise = torch.randint(tiny.VOCAB, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    model = tiny.gpt2(initializer_range=0.0)  # uniform: cannot be beaten on noise
    mixture = KNNLMForCausalLM(model, knn.memory, allow_mismatch=True)
    with caplog.at_level(logging.WARNING):
        best = tune(mixture, [noise], apply=False, progress=False)
    assert best.helps or "does not help" in caplog.text


def test_bad_settings(knn):
    scores = table()
    for options in ({"ks": [0]}, {"temperatures": [0.0]}, {"lmbdas": [1.0]}, {"lmbdas": [-0.1]}):
        with pytest.raises(SettingError):
            fit(scores, **options)
    with pytest.raises(KNNLMError, match="only 50"):
        fit(scores, ks=[51])
    with pytest.raises(SettingError, match="empty"):
        fit(scores, ks=[])
    with pytest.raises(KNNLMError, match="wrap"):
        tune(tiny.gpt2(), tiny.corpus())
