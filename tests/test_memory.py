"""KNNMemory against a float64 loop over every entry."""

import copy
import logging
import math
import pickle
import shutil

import faiss
import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNMemory
from knnlm_hf.errors import KNNLMError, SearchIndexError, SettingError
from knnlm_hf.interpolation import Few
from knnlm_hf.memory import Memory, as_memory

INF = math.inf


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(), path, dtype="float32", progress=False)


@pytest.fixture
def own_store(store, tmp_path):
    """A copy, to be changed."""
    shutil.copytree(store.path, tmp_path / "store")
    return Datastore.open(tmp_path / "store")


@pytest.fixture(scope="module")
def queries(store):
    noise = torch.randn(7, store.dim, generator=torch.Generator().manual_seed(0))
    return store.keys[torch.arange(7) * 3] + 0.3 * noise


def similarities(store, queries, metric):
    """(Q, N) in float64, by the definition."""
    keys = store.keys[:].double().numpy()
    q = queries.double().numpy()
    if metric == "ip":
        return q @ keys.T
    return -((q[:, None, :] - keys[None]) ** 2).sum(-1)


def distribution(similarity_QN, values, k, temperature, vocab_size):
    """p_kNN of every token, in float64, entry by entry."""
    result = np.zeros((len(similarity_QN), vocab_size))
    for q, row in enumerate(similarity_QN):
        nearest = np.argsort(-row, kind="stable")[:k]
        weights = np.exp((row[nearest] - row[nearest].max()) / temperature)
        for i, weight in zip(nearest, weights / weights.sum(), strict=True):
            result[q, values[i]] += weight
    return result


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (5, 0.7), (64, 10.0), (10_000, 3.0)])
def test_log_probs(store, queries, metric, k, temperature):
    memory = KNNMemory(store, k=k, temperature=temperature, metric=metric)
    values = store.values.tolist()
    expected = distribution(
        similarities(store, queries, metric), values, min(k, len(store)), temperature, tiny.VOCAB
    )
    got = memory.log_probs(queries)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.exp().double().numpy(), expected, rtol=1e-3, atol=1e-6)
    assert ((got == -INF).numpy() == (expected == 0)).all()
    targets = torch.arange(7) * 5
    one = memory.token_log_probs(queries, targets)
    torch.testing.assert_close(one, got[torch.arange(7), targets])


def test_shapes_and_dtypes(store, queries):
    memory = KNNMemory(store, k=4)
    flat = memory.log_probs(queries[:6])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        shaped = memory.log_probs(queries[:6].reshape(2, 3, -1).to(dtype))
        assert shaped.shape == (2, 3, tiny.VOCAB)
        assert shaped.dtype == torch.float32
    torch.testing.assert_close(memory.log_probs(queries[:6].reshape(2, 3, -1)).reshape(6, -1), flat)
    assert memory.log_probs(queries[:0]).shape == (0, tiny.VOCAB)
    assert memory.token_log_probs(queries[0], torch.tensor(3)).shape == ()


def test_search_gives_the_values_of_the_entries(store, queries):
    near = KNNMemory(store, k=9).search(queries)
    assert near.similarity.shape == near.ids.shape == near.tokens.shape == (7, 9)
    assert torch.equal(near.tokens, store.values[near.ids].long())
    assert (near.similarity.diff(dim=1) <= 0).all()


def test_a_search_of_ones_own_is_seen_by_the_distribution(store, queries):
    class OnlyOne(KNNMemory):
        def search(self, queries, k=None, *, exclude=None):
            return super().search(queries, 1, exclude=exclude)

    memory, nearest = OnlyOne(store, k=20), KNNMemory(store, k=1, temperature=1.0)
    assert torch.equal(memory.log_probs(queries), nearest.log_probs(queries))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("settings", [
    {}, {"k": 10_000}, {"index": "exact"}, {"rescore": True}, {"temperature": 1e-4}
], ids=str)  # fmt: skip
def test_what_is_said_of_one_query(own_store, queries, metric, settings):
    """The same as of many, whether or not it is found and said in arrays."""
    own_store.build_index("IVF2,SQ8", metric=metric, progress=False)
    options = {"k": 9, "temperature": 2.0, "metric": metric, "index": "IVF2,SQ8"} | settings
    for removed in ([], [0, 3, 4]):
        if removed:
            own_store.remove(removed)
        memory = KNNMemory(own_store, **options)
        for query in queries[:, None, None]:
            said = memory.said_of_one(query)
            if isinstance(said, Few):
                said = said.log_probs().view(1, 1, -1)
            expected = memory.log_probs(query.repeat(2, 1, 1))[:1]
            torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)


def test_a_search_of_ones_own_is_seen_of_one_query(own_store, queries):
    class OnlyOne(KNNMemory):
        def search(self, queries, k=None, *, exclude=None):
            return super().search(queries, 1, exclude=exclude)

    own_store.build_index("IVF2,SQ8", progress=False)
    memory = OnlyOne(own_store, k=20, index="IVF2,SQ8", temperature=1.0)
    assert len(memory.said_of_one(queries[:1]).tokens) == 1


def test_a_large_distribution_is_made_in_parts(store, queries, monkeypatch):
    memory = KNNMemory(store, k=7)
    whole = memory.log_probs(queries)
    monkeypatch.setattr("knnlm_hf.memory.neighbours._MAX_DISTRIBUTION", 3 * memory.vocab_size)
    torch.testing.assert_close(memory.log_probs(queries), whole)
    assert memory.log_probs(queries[:0]).shape == (0, memory.vocab_size)


@pytest.mark.parametrize("count", [1, 7])
def test_more_neighbours_than_entries_are_missing_hits(store, queries, count):
    near = KNNMemory(store, k=len(store) + 3).search(queries[:count])
    assert (near.ids[:, -3:] == -1).all()
    assert (near.tokens[:, -3:] == -1).all()  # not the last entry's value
    assert (near.similarity[:, -3:] == -INF).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_query_from_the_store_does_not_find_itself(store, metric):
    ids = torch.arange(0, len(store), 5)
    memory = KNNMemory(store, k=6, metric=metric)
    queries = store.keys[ids]
    near = memory.search(queries, exclude=ids)
    assert not (near.ids == ids[:, None]).any()
    truth = similarities(store, queries, metric)
    truth[np.arange(len(ids)), ids.numpy()] = -INF
    expected = -np.sort(-truth, axis=1)[:, :6]
    np.testing.assert_allclose(near.similarity.numpy(), expected, rtol=1e-4, atol=1e-3)
    # The first hit need not be the entry itself: −1 excludes nothing.
    unrestricted = memory.search(queries, exclude=torch.full_like(ids, -1))
    assert torch.equal(unrestricted.ids, memory.search(queries).ids)


def test_rescore_gives_the_true_similarities_of_the_index_s_candidates(store, queries):
    coarse = faiss.index_factory(store.dim, "PQ4x4")
    coarse.train(store.keys[:].numpy())
    coarse.add(store.keys[:].numpy())
    masked = KNNMemory(store, k=8, index=coarse).search(queries)
    rescored = KNNMemory(store, k=8, index=coarse, rescore=True).search(queries)
    truth = similarities(store, queries, "l2")
    for q in range(len(queries)):
        assert set(masked.ids[q].tolist()) == set(rescored.ids[q].tolist())
        np.testing.assert_allclose(
            rescored.similarity[q].numpy(), truth[q, rescored.ids[q].numpy()], rtol=1e-4, atol=1e-3
        )
    assert not torch.allclose(masked.similarity, rescored.similarity)
    assert (rescored.similarity.diff(dim=1) <= 0).all()


def test_a_custom_index_must_fit(store):
    wrong_metric = faiss.IndexFlatIP(store.dim)
    wrong_metric.add(store.keys[:].numpy())
    with pytest.raises(SearchIndexError, match="l2"):
        KNNMemory(store, index=wrong_metric)
    with pytest.raises(SearchIndexError, match=f"{len(store)}"):
        KNNMemory(store, index=faiss.IndexFlatL2(store.dim))
    with pytest.raises(SearchIndexError, match="expected"):
        KNNMemory(store, index=3)


def test_settings_are_checked(store):
    for k in (0, -1, 2.5, True, None, "many"):
        with pytest.raises(SettingError, match="k is"):
            KNNMemory(store, k=k)
    for temperature in (0, -2, INF, math.nan, "hot"):
        with pytest.raises(SettingError, match="temperature"):
            KNNMemory(store, temperature=temperature)
    with pytest.raises(SettingError, match="l2, ip"):
        KNNMemory(store, metric="cosine")
    with pytest.raises(SearchIndexError, match="build"):
        KNNMemory(store, index="IVF4,Flat")
    with pytest.raises(KNNLMError, match=f"expected \\(Q, {store.dim}\\)"):
        KNNMemory(store).search(torch.zeros(2, store.dim + 1))
    with pytest.raises(KNNLMError, match="one per hidden state"):
        KNNMemory(store).token_log_probs(torch.zeros(2, store.dim), torch.zeros(3))
    memory = KNNMemory(store)
    with pytest.raises(SettingError):
        memory.k = 0
    with pytest.raises(SettingError):
        memory.temperature = -1


def test_hidden_states_that_are_not_finite_are_refused(store):
    with pytest.raises(KNNLMError, match="finite"):
        KNNMemory(store).log_probs(torch.full((1, store.dim), math.nan))


def test_the_temperature_comes_from_the_data(store):
    memory = KNNMemory(store, k=32)
    assert 0 < memory.temperature < INF
    memory.temperature = 3
    assert memory.temperature == 3.0


def test_many_entries_without_an_index_are_worth_a_warning(store, caplog, monkeypatch):
    monkeypatch.setattr("knnlm_hf.memory.knn._MANY_ENTRIES", 10)
    with caplog.at_level(logging.WARNING):
        KNNMemory(store)
    assert "build_index" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        KNNMemory(store, index="exact")
    assert not caplog.text


def test_auto_uses_the_built_index(tmp_path):
    store = Datastore.build(tiny.gpt2(), tiny.corpus(), tmp_path / "store", progress=False)
    store.build_index("IVF4,Flat", metric="l2", nprobe=4, progress=False)
    memory = KNNMemory(store, k=3)
    assert len(memory.index) == len(store)
    assert memory.index.info.spec == "IVF4,Flat"
    exact = KNNMemory(store, k=3, index="exact")
    queries = store.keys[:9].float()
    torch.testing.assert_close(
        memory.search(queries).similarity, exact.search(queries).similarity, rtol=1e-4, atol=1e-3
    )
    with pytest.raises(SearchIndexError, match="l2"):
        KNNMemory(store, metric="ip")  # an index of another metric is never used silently


def test_copies_share_the_store_and_pickles_reopen_it(store):
    memory = KNNMemory(store, k=5, temperature=2.0)
    twin = copy.deepcopy(memory)
    assert twin.store is memory.store
    twin.k = 7
    assert memory.k == 5
    loaded = pickle.loads(pickle.dumps(memory))
    assert (loaded.k, loaded.temperature) == (5, 2.0)
    queries = store.keys[:3]
    assert torch.equal(loaded.log_probs(queries), memory.log_probs(queries))
    custom = faiss.IndexFlatL2(store.dim)
    custom.add(store.keys[:].numpy())
    with pytest.raises(KNNLMError, match="build_index"):
        pickle.dumps(KNNMemory(store, index=custom))


def test_as_memory(store):
    assert as_memory(store).store is store
    assert as_memory(str(store.path)).k == 1024
    memory = KNNMemory(store)
    assert as_memory(memory) is memory
    assert isinstance(memory, Memory)
    with pytest.raises(KNNLMError, match="lacks layer"):
        as_memory(object())
