"""Tuning against an exhaustive loop in float64 over the same grid."""

import copy
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny_memory import head_of

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, perplexity, tune
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores
from knnlm_hf.tuning import descent, fit, shares
from knnlm_hf.tuning.shares import best_shares


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


def several(seed=0, n=400, kinds=("search", "head", "search")):
    """Scores of memories that know different tokens."""
    generator = torch.Generator().manual_seed(seed)
    memories = []
    for number, kind in enumerate(kinds):
        if kind == "search":
            (found,) = table(10 * seed + number, n, k=12, hit_share=0.15).memories
            memories.append(found)
        else:
            noise = torch.randn(n, generator=generator)
            memories.append(Evidence(scores=(-1.5 + 1.5 * noise).clamp(max=-0.01)))
    return replace(table(seed, n), memories=tuple(memories), lmbdas=(0.0,) * len(kinds))


def loop_of_several(scores, lmbdas, settings):
    """Perplexity in float64, token by token; settings (t, k) of each memory, or None."""
    total = 0.0
    for n, lm in enumerate(scores.lm_log_probs.double().tolist()):
        share, mixed = 1.0, 0.0
        for found, lmbda, setting in zip(scores.memories, lmbdas, settings, strict=True):
            if setting is None:
                p = math.exp(found.scores[n].item())
            else:
                row = found.similarity[n, : setting[1]].double().numpy()
                if row[0] == -math.inf:
                    continue
                weights = np.exp((row - row[0]) / setting[0])
                p = weights[found.is_target[n, : setting[1]].numpy()].sum() / weights.sum()
            share -= lmbda
            mixed += lmbda * p
        total += math.log(share * math.exp(lm) + mixed)
    return math.exp(-total / len(scores))


def ratios(seed, n, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).mul(2).exp() for _ in range(count)]


def gain_of(lmbdas, rows):
    mixed = 1 + sum(lm * (row.double() - 1) for lm, row in zip(lmbdas, rows, strict=True))
    return mixed.log().mean().item()


def test_hand_worked_shares():
    """Model and two memories, each sure of one token of three: by symmetry a third each."""
    model = torch.tensor([1.0, 1e-9, 1e-9])
    one, two = torch.tensor([1e-9, 1.0, 1e-9]) / model, torch.tensor([1e-9, 1e-9, 1.0]) / model
    assert best_shares([one, two]) == pytest.approx((1 / 3, 1 / 3), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_shares_of_two_memories_against_a_grid(seed):
    rows = ratios(seed, 150, 2)
    steps = torch.linspace(0, 0.999, 120).tolist()
    grid = [(a, b) for a in steps for b in steps if a + b <= 0.999]
    best = max(grid, key=lambda lmbdas: gain_of(lmbdas, rows))
    found = best_shares(rows)
    assert gain_of(found, rows) >= gain_of(best, rows) - 1e-9
    assert found == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_satisfy_the_conditions_of_the_optimum(seed, count, monkeypatch):
    """Where λ > 0 slopes are equal, and none is larger; 0 unless Σ λ is at its limit.

    In a few steps: expectation–maximisation alone would take hundreds.
    """
    monkeypatch.setattr(shares, "_STEPS", 30)
    rows = ratios(seed, 300, count)
    lmbdas = best_shares(rows)
    mixed = 1 + sum(lm * (row.double() - 1) for lm, row in zip(lmbdas, rows, strict=True))
    slopes = [((row.double() - 1) / mixed).mean().item() for row in rows]
    largest = max(slopes) if sum(lmbdas) > 0.999 - 1e-9 else 0.0
    assert largest >= 0
    for lmbda, slope in zip(lmbdas, slopes, strict=True):
        assert slope <= largest + 1e-6
        if lmbda > 0:
            assert slope == pytest.approx(largest, abs=1e-6)


def test_shares_at_the_edges():
    n = 50
    useless, perfect = torch.zeros(n), torch.full((n,), 1e30)
    silent, good = torch.ones(n), torch.arange(n) % 2 * 3.0
    assert best_shares([useless]) == (0.0,)
    assert best_shares([useless, good])[0] == 0
    assert best_shares([perfect])[0] == pytest.approx(0.999, abs=1e-6)
    assert sum(best_shares([perfect, good])) == pytest.approx(0.999, abs=1e-6)
    assert best_shares([silent, silent]) == (0.0, 0.0)  # as good as any, and nothing is asked
    (one,) = best_shares([good])
    assert sum(best_shares([good, good])) == pytest.approx(one, abs=1e-6)  # the same twice
    for lmbda in best_shares([good, useless, good]):
        assert lmbda >= 0


@pytest.mark.parametrize("kinds", [("head", "search"), ("search", "search")])
def test_settings_and_shares_together(kinds):
    """Every t, k and λ of two memories, against an exhaustive loop."""
    scores = several(1, 150, kinds)
    ks, ts, shares = [2, 12], [5.0, 30.0], [(a, b) for a in (0, 0.2, 0.4) for b in (0, 0.2, 0.4)]
    grids = [[None] if kind == "head" else [(t, k) for t in ts for k in ks] for kind in kinds]
    every = {
        (loop_of_several(scores, lmbdas, (one, two)), lmbdas, one, two)
        for lmbdas in shares for one in grids[0] for two in grids[1]
    }  # fmt: skip
    value, *_ = min(every, key=lambda entry: entry[0])
    best = fit(scores, ks=ks, temperatures=ts, lmbdas=shares)
    assert best.perplexity == pytest.approx(value, rel=1e-5)
    settings = [
        None if t is None else (t, k) for t, k in zip(best.temperature, best.k, strict=True)
    ]
    assert loop_of_several(scores, best.lmbda, settings) == pytest.approx(value, rel=1e-5)
    free = fit(scores, ks=ks, temperatures=ts)
    assert free.perplexity <= best.perplexity * (1 + 1e-6)
    assert free.perplexity == pytest.approx(
        scores.perplexity(free.lmbda, free.temperature, free.k), rel=1e-5
    )


def test_more_memories_are_never_worse():
    scores = several(2)
    best = fit(scores)
    assert len(best.lmbda) == len(best.temperature) == len(best.k) == 3
    assert (best.temperature[1], best.k[1]) == (None, None)
    for found in scores.memories:
        assert best.perplexity <= fit(replace(scores, memories=(found,))).perplexity * (1 + 1e-6)
    assert best.perplexity == pytest.approx(
        scores.perplexity(best.lmbda, best.temperature, best.k), rel=1e-5
    )
    assert best.helps
    assert best.message.count("lmbda") == 3


def test_a_useless_memory_beside_others_gets_nothing():
    scores = several(3, kinds=("search", "head"))
    near, head = scores.memories
    useless = replace(near, is_target=torch.zeros_like(near.is_target))
    best = fit(replace(scores, memories=(useless, head)))
    assert best.lmbda[0] == 0
    assert best.lmbda[1] == pytest.approx(fit(replace(scores, memories=(head,))).lmbda, abs=1e-3)


def started_at(scores, *temperatures):
    memories = [
        replace(found, temperature=t)
        for found, t in zip(scores.memories, temperatures, strict=True)
    ]
    return replace(scores, memories=tuple(memories))


@pytest.mark.parametrize("start", [1e-30, 1e-4, 0.01, 1.0, 300.0, 1e5])
def test_a_memory_s_temperature_may_be_far_off(start):
    scores = table()
    best = fit(started_at(scores, start), ks=[12, 50])
    assert best.perplexity == pytest.approx(fit(scores, ks=[12, 50]).perplexity, rel=1e-4)
    far = fit(started_at(scores, start), ks=[12, 50], temperatures=[start])
    assert far.temperature == start  # what is asked for is not improved on
    both = several(4, 150, ("search", "head", "search"))
    found = fit(started_at(both, start, 1.0, 1 / start))
    assert found.perplexity == pytest.approx(fit(both).perplexity, rel=1e-3)


def sharp(n=400, k=32):
    """Each query has two neighbours that matter, nearly equally near, and many far ones."""
    generator = torch.Generator().manual_seed(0)
    similarity = -100 * torch.rand(n, k, generator=generator).sort(1).values - 1
    similarity[:, 0] = 0
    similarity[:, 1] = -0.06 * torch.rand(n, generator=generator)
    is_target = torch.zeros(n, k, dtype=torch.bool)
    is_target[:, 0] = torch.rand(n, generator=generator) < 0.6
    is_target[:, 1] = ~is_target[:, 0]
    found = Evidence(similarity=similarity, is_target=is_target)
    return replace(table(n=n), memories=(found,))


def test_the_grid_of_temperatures_grows_while_its_end_is_the_best():
    scores = sharp()
    wide = [0.01 * 2 ** (step / 8) for step in range(80)]
    best = fit(scores, ks=[32], temperatures=wide)
    assert wide[0] < best.temperature < 0.5  # far below what the neighbourhoods' width suggests
    for start in (1.5, 20.0, 290.0, 4000.0):
        found = fit(started_at(scores, start), ks=[32])
        assert found.perplexity == pytest.approx(best.perplexity, rel=1e-4)
    # Seen from far below: from a grid that ends at 25 times the first t.
    hot = fit(started_at(table(4), 2.0))
    assert hot.temperature > 2 * 2 ** (14 / 3) * 1.3
    assert hot.perplexity < fit(table(4), temperatures=[61.0]).perplexity


def test_the_grid_does_not_grow_for_nothing(monkeypatch):
    asked = []
    compute = descent.knn_probabilities
    monkeypatch.setattr(
        descent,
        "knn_probabilities",
        lambda found, ks, ts, weight: asked.append(len(ts)) or compute(found, ks, ts, weight),
    )
    fit(table())
    assert asked == [30, 8]
    asked.clear()
    nearest_only = fit(table(), ks=[1])  # no t matters
    assert asked == [30, 15, 8]
    assert nearest_only.temperature == pytest.approx(10 * 2**-5)
    # Neighbours that say nothing by their distance: the hotter the better, for ever less.
    generator = torch.Generator().manual_seed(1)
    (found,) = table().memories
    even = replace(found, is_target=torch.rand(found.is_target.shape, generator=generator) < 0.3)
    best = fit(replace(table(), memories=(even,)), ks=[50])
    assert 100 < best.temperature < 1e4


def covering(found, tokens=3):
    """The same memory, whose nearest neighbour carries each of the first tokens."""
    if found.is_target is None:
        return found
    similarity, is_target = found.similarity.clone(), found.is_target.clone()
    similarity[:tokens] = -torch.arange(found.k).float()
    is_target[:tokens, 0] = True
    return replace(found, similarity=similarity, is_target=is_target)


@pytest.mark.parametrize("low", [-120.0, -math.inf])
@pytest.mark.parametrize("kinds", [("search",), ("head",), ("search", "head", "search")])
def test_tokens_that_the_model_gives_no_probability(kinds, low):
    """A log P_LM that no float32 probability can hold, down to −∞."""
    scores = several(5, 200, kinds)
    lm = scores.lm_log_probs.clone()
    lm[:3] = torch.tensor([low, -100.0, -95.0])
    held = replace(scores, lm_log_probs=lm, memories=tuple(map(covering, scores.memories)))
    best = fit(held)
    found = best.lmbda, best.temperature, best.k
    lmbdas, ts, ks = found if len(kinds) > 1 else ((value,) for value in found)
    settings = [None if t is None else (t, k) for t, k in zip(ts, ks, strict=True)]
    assert best.perplexity == pytest.approx(loop_of_several(held, lmbdas, settings), rel=1e-5)
    assert best.base_perplexity == held.base_perplexity
    assert best.helps
    assert f" → {best.perplexity:.2f} with" in best.message


def test_a_token_that_nobody_gives_probability():
    scores = table()
    scores.lm_log_probs[0] = -math.inf
    scores.memories[0].is_target[0] = False
    best = fit(scores)
    assert best.perplexity == best.base_perplexity == math.inf


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


def test_tune_applies_what_it_finds_to_each_memory(knn):
    model, head = knn.unwrap(), head_of(knn.unwrap())
    near = copy.deepcopy(knn.memory)
    both = KNNLMForCausalLM(model, [head, near], lmbda=[0.1, 0.1])
    best = tune(both, tiny.corpus(seed=7), progress=False)
    assert both.lmbda == best.lmbda
    assert (near.k, near.temperature) == (best.k[1], best.temperature[1])
    assert (best.k[0], best.temperature[0], head.temperature) == (None, None, 1.0)
    report = perplexity(both, tiny.corpus(seed=7), progress=False)
    assert report.perplexity == pytest.approx(best.perplexity, rel=1e-4)


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
