"""Neighbours that also count the tokens before: against loops, in forwards, with KV caches."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_cli import run_json
from torch import Tensor

from knnlm_hf import (
    CacheMemory,
    Datastore,
    HybridMemory,
    KNNLMForCausalLM,
    KNNMemory,
    MLPMemory,
    perplexity,
    score,
    tune,
)
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.interpolation import Few
from knnlm_hf.memory.text import Text
from knnlm_hf.modeling import ahead
from knnlm_hf.tuning import descent, fit

ITEMS = tiny.corpus(seed=3)
HELD_OUT = tiny.corpus(seed=8)
READING = {"window": 16, "stride": 6, "batch_size": 3, "progress": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def store(model: Any, tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("hybrid") / "store"
    return Datastore.build(model, ITEMS, path, shard_size=50, tokenizer=tiny.tokenizer(), **READING)


def entries() -> list[tuple[int, list[int]]]:
    """The token of each entry, and those before it but for its document's first, last first."""
    return [(item[i], item[1:i][::-1]) for item in ITEMS for i in range(1, len(item))]


def alike(one: list[int], other: list[int], most: int) -> int:
    """How many tokens two contexts share from their ends on."""
    count = 0
    for a, b in zip(one[:most], other[:most], strict=False):
        if a != b:
            break
        count += 1
    return count


def probabilities(
    store: Any, query: Tensor, before: list[int], *, k: int, t: float, length: int, weight: float,
    metric: str = "l2", exclude: int = -1,
) -> np.ndarray:  # fmt: skip
    """(V,) in float64, one entry at a time."""
    keys = store.keys[torch.arange(len(store))].double().numpy()
    query = query.double().numpy()
    similarity = keys @ query if metric == "ip" else -((keys - query) ** 2).sum(1)
    order = [i for i in np.argsort(-similarity, kind="stable") if i != exclude][:k]
    said = entries()
    shared = np.array([alike(before, said[i][1], length) for i in order])
    logits = similarity[order] / t + weight * shared
    weights = np.exp(logits - logits.max())
    probs = np.zeros(tiny.VOCAB)
    for i, one in zip(order, weights / weights.sum(), strict=True):
        probs[said[i][0]] += one
    return probs


def mixture(model: Any, store: Any, text: list[int], lmbda: float, **settings: Any) -> np.ndarray:
    """(T, V) log P at each position of a text, by definition."""
    caught: list[Tensor] = []
    place = model.transformer.h[-1].mlp
    handle = place.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        lm = model(torch.tensor([text])).logits[0].double().softmax(-1).numpy()
    handle.remove()
    rows = []
    for place, query in enumerate(caught[0][0]):
        before = text[1 : place + 1][::-1]
        probs = probabilities(store, query, before, **settings)
        rows.append(np.log((1 - lmbda) * lm[place] + lmbda * probs))
    return np.stack(rows)


@torch.no_grad()
def logits_of(knn: Any, text: list[int]) -> np.ndarray:
    """(T, V) of one text."""
    found: np.ndarray = knn(torch.tensor([text])).logits[0].double().numpy()
    return found


SETTINGS = {"k": 20, "t": 6.0, "length": 3, "weight": 1.5}


def memory_of(store: Any, **changes: Any) -> HybridMemory:
    s = {**SETTINGS, **changes}
    return HybridMemory(
        store, k=s["k"], temperature=s["t"], metric=s.get("metric", "l2"),
        index=s.get("index", "exact"),
        match_length=s["length"], match_weight=s["weight"],
    )  # fmt: skip


# --- the distribution -------------------------------------------------------------------------


def test_hand_worked(tmp_path: Any) -> None:
    """Two equally near entries, 7 after "5 6" and 8 after "4 6"; the query stands after "5 6"."""
    store = Datastore.build(tiny.gpt2(), [[3, 5, 6, 7], [3, 4, 6, 8]], tmp_path / "s", **READING)
    memory = HybridMemory(store, k=6, temperature=1.0, match_weight=float(np.log(3)))
    values = torch.tensor([[5, 6, -1]])
    text = Text(torch.zeros(1, 3, store.dim), values, torch.zeros(1, 3, dtype=torch.long))
    asked = memory.reading(text, torch.tensor([0]), torch.tensor([2]))
    #  entries: 5|  6|5  7|6,5   4|  6|4  8|6,4 (before the first there is no value)
    assert asked.matches(torch.arange(6)[None]).tolist() == [[0, 0, 2, 0, 0, 1]]
    near = memory.search(torch.zeros(1, store.dim))
    even = near._replace(
        similarity=torch.zeros(1, 6), ids=torch.arange(6)[None], tokens=store.values[None].long()
    )
    weights = (asked.scored(even) / memory.temperature).softmax(1)
    assert weights[0].tolist() == pytest.approx([1 / 16, 1 / 16, 9 / 16, 1 / 16, 1 / 16, 3 / 16])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("k", "length", "weight"),
    [(20, 3, 1.5), (1, 2, 4.0), (500, 1, 0.5), (13, 64, 8.0), (9, 3, 0.0)],
)
def test_forward_against_a_loop_in_float64(
    model: Any, store: Any, metric: str, k: int, length: int, weight: float
) -> None:
    settings = {"k": min(k, len(store)), "t": 6.0, "length": length, "weight": weight}
    knn = KNNLMForCausalLM(model, memory_of(store, metric=metric, **settings), lmbda=0.4)
    text = ITEMS[4][:12] + HELD_OUT[3][:8]
    found = logits_of(knn, text)
    truth = mixture(model, store, text, 0.4, metric=metric, **settings)
    np.testing.assert_allclose(found, truth, atol=2e-4)
    plain = KNNMemory(store, settings["k"], 6.0, metric, index="exact")
    other = logits_of(KNNLMForCausalLM(model, plain, lmbda=0.4), text)
    assert (np.abs(other - truth).max() < 2e-4) == (weight == 0 or k == 1)


def test_without_a_text_nothing_matches(store: Any) -> None:
    states = torch.randn(2, 3, store.dim)
    plain = KNNMemory(store, 20, 6.0, index="exact")
    assert torch.equal(memory_of(store).log_probs(states), plain.log_probs(states))
    assert memory_of(store).matches(torch.zeros(2, 3, dtype=torch.long)) is None


def test_missing_hits_and_other_numbers_of_queries(store: Any) -> None:
    text = Text(
        torch.zeros(1, 4, store.dim), torch.tensor([[5, 6, 7, -1]]), torch.zeros(1, 4).long()
    )
    asked = memory_of(store).reading(text, torch.zeros(2).long(), torch.tensor([0, 3]))
    assert asked.matches(torch.full((2, 3), -1)).tolist() == [[0] * 3] * 2
    assert asked.matches(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)
    with pytest.raises(KNNLMError, match="3 queries, but 2 places"):
        asked.matches(torch.zeros(3, 1, dtype=torch.long))


def test_what_is_said_of_one_query(model: Any, store: Any, tmp_path: Any) -> None:
    """The same, whether or not it is found and said in arrays."""
    shutil.copytree(store.path, tmp_path / "copy")
    indexed = Datastore.open(tmp_path / "copy")
    indexed.build_index("IVF2,Flat", progress=False)
    item, generator = max(ITEMS, key=len), torch.Generator().manual_seed(1)
    tokens = torch.tensor([[*item[1:], -1]])
    text = Text(torch.zeros(1, len(item), store.dim), tokens, torch.zeros_like(tokens))
    some = 0
    for place in range(len(item)):
        state = torch.randn(1, 1, store.dim, generator=generator)
        answers = []
        for memory in (memory_of(store), memory_of(indexed, index="IVF2,Flat")):
            if memory.index_name != "exact":
                memory.index.nprobe = 2
            reader = memory.reading(text, torch.zeros(1).long(), torch.tensor([place]))
            said = reader.said_of_one(state)
            assert isinstance(said, Few)
            answers.append(said.log_probs())
            torch.testing.assert_close(answers[-1], reader.log_probs(state)[0])
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
        some += int(not torch.allclose(answers[0], memory.said_of_one(state).log_probs()))
    assert some > 3
    reader = memory.reading(text, torch.zeros(2).long(), torch.tensor([0, 3]))
    with pytest.raises(KNNLMError, match="1 queries, but 2 places"):
        reader.said_of_one(state)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_one_query_matches_as_one_of_two(store: Any, length: int) -> None:
    """It has a way of its own, for the text before it as for the entries."""
    memory = memory_of(store, length=length)
    generator = torch.Generator().manual_seed(length)
    values = store.values[:40].long().repeat(2, 1)
    values[:, 3::11] = -2
    parts = (torch.arange(40) >= 13).long().repeat(2, 1)
    text = Text(torch.zeros(2, 40, store.dim), values, parts)
    ids = torch.randint(-1, len(store), (1, 200), generator=generator)
    ids[0, :44] = torch.arange(-1, 43)  # some match
    some = 0
    for place in range(40):
        rows, places = torch.tensor([0, 1]), torch.tensor([place, place])
        two = memory.reading(text, rows, places)
        one = memory.reading(text, rows[1:], places[1:])
        assert torch.equal(one._before_QM, two._before_QM[1:])
        expected = two.matches(ids.repeat(2, 1))
        assert expected is not None
        assert torch.equal(one.matches(ids), expected[1:])
        some += int((expected == length).any())
    assert some > 9


def test_packed_and_padded_texts_are_texts_of_their_own(model: Any, store: Any) -> None:
    one, two = ITEMS[4][:9], ITEMS[5][:6]
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    alone = [knn(torch.tensor([text])).logits[0] for text in (one, two)]
    ids = torch.tensor([one, [0] * 3 + two])
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    places = torch.tensor([[*range(9)], [0, 0, 0, *range(6)]])
    padded = knn(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(padded[0], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[1, 3:], alone[1], rtol=0, atol=1e-4)
    # What a packed row's second text shares with the first one's end does not count.
    text = Text(
        torch.zeros(1, 6, store.dim),
        torch.tensor([[5, 6, -1, 5, 6, -1]]),
        torch.tensor([[0, 0, 0, 1, 1, 1]]),
    )
    asked = memory_of(store).reading(text, torch.zeros(2).long(), torch.tensor([2, 5]))
    assert asked._before_QM is not None
    assert asked._before_QM.tolist() == [[6, 5, -1]] * 2


# --- with a KV cache --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "prompt lookup", "static cache"],
)
def test_generate_with_a_cache_as_without(model: Any, store: Any, options: dict[str, Any]) -> None:
    knn = KNNLMForCausalLM(model, memory_of(store, weight=3.0), lmbda=0.6)
    ids = torch.tensor([ITEMS[4][:7]])
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    beams = {"num_beams": options.get("num_beams", 1)}
    truth = knn.generate(ids, use_cache=False, **settings, **beams)
    assert knn.generate(ids, **settings, **options).tolist() == truth.tolist()


def test_steps_with_a_cache_against_the_loop(model: Any, store: Any) -> None:
    text = ITEMS[4][:14]
    truth = mixture(model, store, text, 0.4, **SETTINGS)
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    output = knn(torch.tensor([text[:5]]), use_cache=True)
    found = [output.logits[0]]
    for token in text[5:]:
        output = knn(torch.tensor([[token]]), past_key_values=output.past_key_values)
        found.append(output.logits[0])
    np.testing.assert_allclose(torch.cat(found).detach().numpy(), truth, atol=2e-4)


def test_it_searches_once_while_the_model_goes_on(
    model: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_of(store, k=20, t=6.0, weight=1.5)
    search, searched_by = memory.index.search, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        searched_by.append(threading.current_thread().name)
        return search(*args, **kwargs)

    monkeypatch.setattr(memory.index, "search", watched)
    knn = KNNLMForCausalLM(model, [memory, KNNMemory(store, k=4)], lmbda=[0.4, 0.1])
    ids = torch.tensor([ITEMS[4][:7]])
    with torch.no_grad():
        early = [knn(ids).logits, knn(ids, logits_to_keep=2).logits]
        assert len(searched_by) == 2
        assert all(name.startswith("knnlm-hf") for name in searched_by)
        monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
        late = [knn(ids).logits, knn(ids, logits_to_keep=2).logits]
    assert set(searched_by[2:]) == {threading.current_thread().name}
    torch.testing.assert_close(early, late)
    memory.match_weight = 0.0
    with torch.no_grad():
        assert not torch.allclose(knn(ids).logits, early[0])  # the text was counted


# --- scores and tuning ------------------------------------------------------------------------


def test_scores_against_the_loop(model: Any, store: Any) -> None:
    """Documents longer than a window are compared beyond it: the text is read to its end."""
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    scores = score(knn, HELD_OUT, **READING)
    plain = KNNLMForCausalLM(model, KNNMemory(store, 20, 6.0, index="exact"), lmbda=0.4)
    states = score(plain, HELD_OUT, **READING)
    assert torch.equal(scores.memories[0].similarity, states.memories[0].similarity)
    queries = Datastore.build(model, HELD_OUT, store.path.parent / "queries", **READING)
    found = scores.memory_log_probs().exp()
    row = 0
    for item in HELD_OUT:
        for place in range(1, len(item)):
            before = item[1:place][::-1]
            truth = probabilities(store, queries.keys[row].float(), before, **SETTINGS)
            assert float(found[row]) == pytest.approx(truth[item[place]], abs=3e-3)
            row += 1
    assert row == len(scores)
    report = perplexity(knn, HELD_OUT, **READING)
    assert report.perplexity == pytest.approx(scores.perplexity(), rel=1e-5)


def test_the_stores_own_text_does_not_find_itself(model: Any, store: Any) -> None:
    knn = KNNLMForCausalLM(model, memory_of(store, weight=8.0, length=64), lmbda=0.4)
    (own,) = score(knn, ITEMS, exclude_self=True, **READING).memories
    assert own.matches is not None
    said = entries()
    near = memory_of(store).search(
        store.keys[torch.arange(len(store))].float(), exclude=torch.arange(len(store))
    )
    for i in range(0, len(store), 7):
        truth = [alike(said[i][1], said[int(j)][1], 64) for j in near.ids[i]]
        agree = sum(a == b for a, b in zip(own.matches[i].tolist(), truth, strict=True))
        assert agree >= 18  # of 20: stored keys are rounded, so a few near ties change places


@pytest.mark.parametrize("k", [20, 7])
@pytest.mark.parametrize("weight", [0.0, 0.7, 8.0])
@pytest.mark.parametrize("t", [0.02, 3.0, 900.0])
def test_the_grid_is_the_kept_evidence(
    model: Any, store: Any, k: int, weight: float, t: float
) -> None:
    from knnlm_hf.tuning.grid import knn_probabilities

    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    (found,) = score(knn, HELD_OUT, **READING).memories
    grid = knn_probabilities(found, [3, k], [t, 2 * t], weight)
    for column, one in enumerate((3, k)):
        truth = found.log_probs(t, one, weight).double().exp()
        np.testing.assert_allclose(grid[0, column].numpy(), truth.numpy(), rtol=2e-4, atol=1e-7)
    similarity = found.similarity[:, :k].double().numpy()
    logits = similarity / t + weight * found.matches[:, :k].double().numpy()
    weights = np.exp(logits - logits.max(1, keepdims=True))
    own = (weights * found.is_target[:, :k].numpy()).sum(1) / weights.sum(1)
    np.testing.assert_allclose(found.log_probs(t, k, weight).exp().numpy(), own, atol=2e-5)


def test_tune_fits_the_match_weight_and_applies_it(model: Any, store: Any) -> None:
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    best = tune(knn, HELD_OUT, **READING)
    assert knn.memory.match_weight == best.match_weight > 0
    assert "match weight" in best.message
    again = perplexity(knn, HELD_OUT, **READING)
    assert again.perplexity == pytest.approx(best.perplexity, rel=1e-4)
    plain = KNNLMForCausalLM(model, KNNMemory(store, 20, 6.0, index="exact"), lmbda=0.4)
    without = tune(plain, HELD_OUT, **READING)
    assert without.match_weight is None
    assert best.perplexity < without.perplexity
    scores = score(knn, HELD_OUT, **READING)
    found = [
        scores.perplexity(best.lmbda, best.temperature, best.k, weight) for weight in (0.0, 8.0)
    ]
    assert min(found) >= best.perplexity
    table = fit(scores)
    figure = scores.perplexity(table.lmbda, table.temperature, table.k, table.match_weight)
    assert figure == pytest.approx(table.perplexity, rel=1e-5)


def test_the_match_weight_of_many_tokens_is_that_of_some(
    model: Any, store: Any, monkeypatch: Any
) -> None:
    scores = score(KNNLMForCausalLM(model, memory_of(store), lmbda=0.4), HELD_OUT, **READING)
    whole = fit(scores)
    few = fit(scores[::3])
    monkeypatch.setattr(descent, "_ENOUGH", len(scores) // 3)
    sampled = fit(scores)
    assert sampled.match_weight == few.match_weight
    assert (sampled.tokens, few.tokens) == (len(scores), len(scores[::3]))
    assert whole.perplexity <= sampled.perplexity < whole.perplexity * 1.02


def test_matches_that_say_nothing_get_no_weight(model: Any, store: Any) -> None:
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    scores = score(knn, HELD_OUT, **READING)
    (found,) = scores.memories
    assert found.matches is not None
    contrary = replace(found, matches=(~found.is_target).to(torch.uint8))
    assert fit(replace(scores, memories=(contrary,))).match_weight == 0


def test_beside_other_memories(model: Any, store: Any) -> None:
    cache = CacheMemory.of(model, size=32, k=32, temperature=6.0)
    knn = KNNLMForCausalLM(model, [memory_of(store), cache], lmbda=[0.3, 0.2])
    best = tune(knn, HELD_OUT, **READING)
    assert best.match_weight[1] is None
    assert knn.memories[0].match_weight == best.match_weight[0]
    scores = score(knn, HELD_OUT, **READING)
    one = scores.perplexity(match_weight=2.0)
    assert one == scores.perplexity(match_weight=[2.0, None])
    assert one != scores.perplexity()
    with pytest.raises(SettingError, match="counts none"):
        scores.perplexity(match_weight=[2.0, 1.0])
    for figure in (scores.oracle, scores.word_perplexity, scores.nll, scores.memory_perplexity):
        figure(match_weight=0.5)
    alone = scores.memory_log_probs(match_weight=0.5)
    assert not torch.equal(alone[0], scores.memory_log_probs()[0])
    assert torch.equal(alone[1], scores.memory_log_probs()[1])
    # The cache finds entries of the text, so only the datastore leaves the query's own one out.
    excluding = score(knn, ITEMS, exclude_self=True, **READING)
    assert len(excluding) == len(store)


# --- what a memory of transformers' users has -------------------------------------------------


def test_explain_shows_the_weights_of_the_mixture(model: Any, store: Any) -> None:
    text = ITEMS[4][:12]
    memory = memory_of(store, weight=4.0)
    knn = KNNLMForCausalLM(model, memory, lmbda=0.4)
    for said in knn.explain(torch.tensor(text), top=20):
        assert sum(one.weight for one in said.neighbours) == pytest.approx(1, abs=1e-4)
        assert all(one.document is not None and one.context for one in said.neighbours)
        weights = [one.weight for one in said.neighbours]
        assert weights == sorted(weights, reverse=True)
        carried = sum(one.weight for one in said.neighbours if one.token == said.predicted)
        assert np.exp(said.memory_log_prob) == pytest.approx(carried, abs=1e-4)
        assert {one.rank for one in said.neighbours} == set(range(1, 21))


def test_save_load_copy_pickle(model: Any, store: Any, tmp_path: Any) -> None:
    knn = KNNLMForCausalLM(model, memory_of(store), lmbda=0.4)
    knn.save_pretrained(tmp_path / "knn", save_base=True)
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "knn")
    ids = torch.tensor([ITEMS[4][:12]])
    truth = knn(ids).logits
    for memory in (
        loaded.memory,
        copy.deepcopy(knn.memory),
        pickle.loads(pickle.dumps(knn.memory)),
    ):
        assert type(memory) is HybridMemory
        assert memory.settings() == knn.memory.settings()
        assert torch.equal(KNNLMForCausalLM(model, memory, lmbda=0.4)(ids).logits, truth)
    assert knn.memory.settings()["match_weight"] == 1.5
    assert "match_length=3, match_weight=1.5" in repr(knn.memory)
    plain = KNNMemory(store, 20, 6.0, index="exact")
    assert type(pickle.loads(pickle.dumps(plain))) is KNNMemory
    for one in (plain, knn.memory):  # every step of a generation makes a copy that has read
        for twin in (copy.copy(one), copy.deepcopy(one)):
            assert twin.store is one.store
            assert twin.index is one.index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_length": 0}, "match_length is 0, expected a whole number"),
        ({"match_length": 65}, "match_length is 65, expected 64 at most"),
        ({"match_weight": -0.1}, "match_weight is -0.1, expected 0 <= match_weight <= 8"),
        ({"match_weight": 9}, "match_weight is 9, expected"),
        ({"match_weight": float("nan")}, "match_weight is nan, expected"),
        ({"match_weight": "much"}, "match_weight is 'much', expected a number"),
    ],
)
def test_settings_out_of_range(store: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        HybridMemory(store, **changes)


def test_what_it_cannot_be_used_with(model: Any, store: Any, tmp_path: Any) -> None:
    sample = store.subsample(0.5, tmp_path / "half", seed=0)
    with pytest.raises(KNNLMError, match="not the text before them"):
        HybridMemory(sample)
    final = Datastore.build(model, ITEMS, tmp_path / "final", layer="final", **READING)
    with pytest.raises(KNNLMError, match="choose att or ffn"):
        KNNLMForCausalLM(model, HybridMemory(final))
    with pytest.raises(SettingError, match="distil a KNNMemory"):
        MLPMemory.train_on(store, teacher=memory_of(store), epochs=1, progress=False)


def test_on_the_command_line(model: Any, store: Any, tmp_path: Any) -> None:
    folder, path = tmp_path / "model", str(store.path)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    corpus = tmp_path / "held-out.txt"
    corpus.write_text("\n".join(tiny.text([item for item in HELD_OUT if len(item) > 1])))
    options = ["--window", "16", "--stride", "6", "--k", "20"]
    best = run_json("tune", folder, corpus, path, "--match-length", "3", *options)
    assert best["match_weight"] > 0
    given = ["--lmbda", best["lmbda"], "--temperature", best["temperature"]]
    matched = ["--match-length", "3", "--match-weight", best["match_weight"]]
    options[5] = str(best["k"])
    found = run_json("eval", folder, corpus, path, *given, *matched, *options)
    assert found["perplexity"] == pytest.approx(best["perplexity"], rel=1e-4)
    plain = run_json("eval", folder, corpus, path, *given, *options)
    assert plain["perplexity"] > found["perplexity"]
