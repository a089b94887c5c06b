"""`knn.explain` of a text longer than the model's context, and where its own tokens came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, score
from knnlm_hf.errors import SettingError

LONG = [token for item in tiny.corpus(4, seed=5) for token in item][:150]  # the context is 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("explain") / "store"
    return Datastore.build(
        tiny.gpt2(), tiny.corpus(), folder, tokenizer=tiny.tokenizer(), progress=False
    )


@pytest.fixture(scope="module")
def knn(store: Datastore) -> Any:
    return KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store, k=12), 0.4)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [
        (150, None, None),
        (150, 32, 32),
        (40, 7, 3),
        (49, 32, 16),
        (33, None, None),
        (2, None, None),
    ],
)
def test_a_token_has_the_probability_that_score_gives_it(knn, length, window, stride):
    ids = LONG[:length]
    scores = score(knn, [ids], window=window, stride=stride, progress=False)
    found = knn.explain(ids, top=1, window=window, stride=stride)
    assert [e.position for e in found] == list(range(length))
    assert [e.token for e in found] == [*ids[1:], None]
    columns = {
        "token_log_prob": scores.log_probs(),
        "token_lm_log_prob": scores.lm_log_probs,
        "token_memory_log_prob": scores.memory_log_probs(),
    }
    for name, expected in columns.items():
        values = [getattr(e, name) for e in found]
        assert values.pop() is None
        assert torch.allclose(torch.tensor(values), expected, atol=1e-5)


def test_what_follows_the_last_token_is_predicted_by_the_last_window(knn):
    """Windows begin at 0, 16 and 32, so that the 49th token is the last of a short third one."""
    last = knn.explain(LONG[:49])[-1]
    logits = knn(torch.tensor([LONG[32:49]])).logits[0, -1]
    assert last.token is None
    assert (last.predicted, last.log_prob) == (logits.argmax(), pytest.approx(logits.max().item()))


def test_carriers_are_the_neighbours_with_the_token(knn, store):
    """However far down they stand, in their order, with rank and weight among all k."""
    beyond = 0
    pairs = zip(knn.explain(LONG[:40], top=2), knn.explain(LONG[:40], top=12), strict=True)
    for e, whole in pairs:
        assert [n.rank for n in whole.neighbours] == list(range(1, 13))
        wanted = e.predicted if e.token is None else e.token
        carrying = [n for n in whole.neighbours if store.values[n.entry] == wanted]
        assert e.carriers == carrying[:2]
        assert e.neighbours == whole.neighbours[:2]
        if e.token is not None:
            share = sum(n.weight for n in carrying)
            assert share == pytest.approx(math.exp(e.token_memory_log_prob), abs=1e-5)
        beyond += any(n.rank > 2 for n in e.carriers)
    assert beyond  # or the test would say nothing of entries that are not among the nearest


def test_several_memories(knn, store, tmp_path: Path):
    other = Datastore.build(
        tiny.gpt2(), tiny.corpus(seed=8), tmp_path / "other", tokenizer=tiny.tokenizer(),
        layer="ffn", progress=False,
    )  # fmt: skip
    two = KNNLMForCausalLM(tiny.gpt2(), [knn.memory, KNNMemory(other, k=5)], [0.4, 0.3])
    e = two.explain(LONG[:20], top=3)[10]
    assert [(n.memory, n.rank) for n in e.neighbours] == [(m, r) for m in (0, 1) for r in (1, 2, 3)]
    assert isinstance(e.token_memory_log_prob, tuple)
    mixed = 0.3 * math.exp(e.token_lm_log_prob)
    for lmbda, each in zip((0.4, 0.3), e.token_memory_log_prob, strict=True):
        mixed += lmbda * math.exp(each)
    assert math.exp(e.token_log_prob) == pytest.approx(mixed, abs=1e-5)
    assert {n.memory for e in two.explain(LONG[:60]) for n in e.carriers} == {0, 1}


def test_refuses_a_window_beyond_the_context(knn):
    with pytest.raises(SettingError, match="the model takes 32 tokens"):
        knn.explain(LONG, window=33)
    with pytest.raises(SettingError, match="stride is 0"):
        knn.explain(LONG, stride=0)
