"""FAISS indexes against brute force in float64 numpy: ids and similarities, both metrics."""

from __future__ import annotations

import builtins
import copy
import itertools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import Keys

from knnlm_hf.datastore.rows import Rows
from knnlm_hf.errors import KNNLMError, SearchIndexError
from knnlm_hf.index import FaissIndex, auto, build_index, choose, selfcheck
from knnlm_hf.index import faiss as index_faiss
from knnlm_hf.index.faiss_build import default_nprobe

faiss = pytest.importorskip("faiss")


def similarities(queries, keys, metric):
    """(Q, N) in float64."""
    q, x = queries.double().numpy(), keys.double().numpy()
    if metric == "ip":
        return q @ x.T
    return -np.stack([((row - x) ** 2).sum(axis=1) for row in q])


def clustered(rows, dim, seed=0, dtype=torch.float16):
    """Keys in a few dozen clusters, as hidden states are; near neighbours mean something."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(24, dim, generator=generator)
    which = torch.randint(24, (rows,), generator=generator)
    return (centres[which] + torch.randn(rows, dim, generator=generator)).to(dtype)


def build(folder, keys, spec, metric="l2", **options):
    values = torch.arange(len(keys), dtype=torch.int32) % 11
    options = {"digest": "d", "progress": False, **options}
    return build_index(Keys(keys), values, folder, spec, metric=metric, **options)


def test_worked_by_hand(tmp_path):
    keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    queries = torch.tensor([[1.0, 1.0]])
    similarity, ids = build(tmp_path, keys, "Flat", "l2").search(queries, 3)
    assert (ids.tolist(), similarity.tolist()) == ([[2, 0, 1]], [[-1.0, -2.0, -13.0]])
    similarity, ids = build(tmp_path, keys, "Flat", "ip").search(queries, 3)
    assert (ids.tolist(), similarity.tolist()) == ([[1, 2, 0]], [[7.0, 1.0, 0.0]])


# spec, least recall of the 20 nearest, largest median error relative to the spread of similarities
SPECS = [
    ("Flat", 1.0, 1e-5),
    ("IVF8,Flat", 0.95, 1e-5),
    ("SQ8", 0.95, 0.01),
    ("SQfp16", 0.99, 0.001),
    ("HNSW16", 0.8, 1e-5),
    ("PQ16x4", 0.3, 0.2),
    ("IVF8,PQ16x4", 0.3, 0.2),
    ("IVF8,SQ8", 0.9, 0.01),
    ("IVF8,PQ16x4fs", 0.3, 0.2),
    ("IVF16(PQ16x4fs),PQ16x4fs", 0.3, 0.2),
    ("IVF8,PQ16x4fs,Refine(SQ8)", 0.3, 0.02),
    ("IVF8,PQ16x4fs,Refine(keys)", 0.3, 1e-5),
    ("PQ16x4fs,Refine(keys)", 0.3, 1e-5),
    ("OPQ8,IVF8,PQ8x4", 0.2, 0.3),
    ("RR32,IVF8,Flat", 0.95, 1e-4),
    ("Pad40,IVF8,PQ10x4fs,Refine(Flat)", 0.2, 1e-4),
]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("spec", "recall", "error"), SPECS)
def test_every_type_that_we_claim(tmp_path, metric, spec, recall, error):
    keys, queries = clustered(1000, 32), clustered(12, 32, seed=1, dtype=torch.float32)
    similarity, ids = build(tmp_path, keys, spec, metric).search(queries, 20)
    truth = similarities(queries, keys, metric)
    nearest = np.argsort(-truth, axis=1)[:, :20]
    found = [np.isin(row, near).mean() for row, near in zip(ids.numpy(), nearest, strict=True)]
    assert np.mean(found) >= recall
    assert (similarity.diff(dim=1) <= 0).all()  # nearest first
    wrong = np.abs(similarity.numpy() - np.take_along_axis(truth, ids.numpy(), axis=1))
    assert np.median(wrong) <= error * truth.std()


def refining(keys, spec, metric="l2", rows=None):
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(keys.shape[1], spec, measure)
    index.train(keys.float().numpy())
    index.add(keys.float().numpy())
    return FaissIndex(index, metric, keys=rows or Keys(keys))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", [1, 7, 32, 61])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_keys_are_compared_in_place(metric, dim, dtype):
    """FAISS itself reads the keys where they lie, for one query and for many.

    Not bfloat16 ones: it would round the query as well on a CPU with AMX, where 32 divides D.
    """
    keys, queries = clustered(300, dim, dtype=dtype), clustered(9, dim, seed=1, dtype=torch.float32)
    index = refining(keys, "IVF8,SQ4", metric)
    index.nprobe = 5
    similarity, ids = index.search(queries, 320)  # some are in no list that is visited
    assert (index._refined is None) == (dtype == torch.bfloat16)
    assert (ids >= 0).sum() < 9 * 300
    truth = similarities(queries, keys, metric)
    for row in range(9):
        there = ids[row] >= 0
        assert there.any()
        assert there.diff().sum() == 1  # what is missing stands last
        assert (similarity[row, ~there] == -torch.inf).all()
        assert (similarity[row].diff()[: there.sum() - 1] <= 0).all()
        expected = truth[row, ids[row, there]]
        np.testing.assert_allclose(similarity[row, there], expected, rtol=1e-5, atol=1e-4)
        alone, same_ids = index.search(queries[row : row + 1], 320)
        assert set(same_ids[0].tolist()) == set(ids[row].tolist())
        torch.testing.assert_close(alone[0], similarity[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "spec", ["IVF8,SQ8,Refine(keys)", "IVF8,SQ8", "Pad8,IVF8,SQ8,Refine(keys)", "SQ8,Refine(keys)"]
)
def test_many_queries_are_answered_in_their_own_order(tmp_path, spec, dtype):
    """They are searched list by list, where there are lists."""
    keys, queries = clustered(400, 6, dtype=dtype), clustered(150, 6, seed=1, dtype=torch.float32)
    index = build(tmp_path, keys, spec)
    assert index._has_order == spec.startswith("IVF8")
    if index._has_order:
        order = index._list_by_list(queries.numpy())
        assert sorted(order) == list(range(150)) != list(order)
    similarity, ids = index.search(queries, 30)
    for row in range(0, 150, 7):
        alone, same_ids = index.search(queries[row : row + 1], 30)
        torch.testing.assert_close(similarity[row], alone[0], rtol=1e-5, atol=1e-4)
        assert set(ids[row].tolist()) == set(same_ids[0].tolist())


@pytest.mark.parametrize("spec", ["IVF8,PQ6x4fs", "RR6,IVF8,PQ6x4fs", "IVF8,PQ6x4fs,Refine(keys)"])
def test_a_fast_scan_alone_is_not_searched_list_by_list(tmp_path, spec):
    index = build(tmp_path, clustered(700, 6), spec)
    assert index._has_order == spec.endswith("Refine(keys)")


SHARED = ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4", "IVF8,PQ8x4fs", "RR8,IVF16(PQ8x4fs),PQ8x4fs"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("spec", SHARED)
def test_cores_share_the_lists_of_one_query(tmp_path, spec, metric, threads, monkeypatch):
    """What they find together is what one finds alone: nearest first, missing hits last."""
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)  # or else it would be slow
    index = build(tmp_path, clustered(600, 8), spec, metric)
    queries = clustered(6, 8, seed=1).float()
    calls, shared = [], FaissIndex._of_one_query
    monkeypatch.setattr(
        FaissIndex, "_of_one_query", lambda *args: calls.append(args) or shared(*args)
    )
    for lists, k in itertools.product((1, 2, 3, 4, 6), (1, 20, 580)):
        index.nprobe = lists
        for query in queries.split(1):
            threads(1)
            assert not index.takes_all_cores
            similarity, ids = index.search(query, k)
            assert not calls
            for cores in (2, 3, 8):
                threads(cores)
                divided = any(lists % n == 0 for n in range(2, min(cores, 4) + 1))
                assert index.takes_all_cores == divided
                got, there = index.search(query, k)
                assert torch.get_num_threads() == cores
                assert len(calls) == divided
                calls.clear()
                torch.testing.assert_close(got, similarity)
                assert torch.equal(there < 0, ids < 0)
                surely = similarity > similarity[ids >= 0].min()  # the last one may be another
                assert set(there[surely].tolist()) == set(ids[surely].tolist())
    threads(2)
    index.search(queries, 5)
    assert not calls


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("spec", [*SHARED, "Flat", "OPQ3_6,RR6,IVF8,Flat", "IVF8,SQ8,Refine(keys)"])
def test_one_query_in_arrays(tmp_path, spec, metric, threads, monkeypatch):
    """What `search` finds, by any number of cores, and the caller's own, whatever comes next."""
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)
    index = build(tmp_path, clustered(600, 8), spec, metric)
    kept = []
    queries = clustered(8, 8, seed=1).float()
    cores, ks = (1, 2, 2, 3, 2, 2, 1, 2), (20, 20, 600, 1) * 2
    for cores_used, k, query in zip(cores, ks, queries.split(1), strict=True):
        threads(cores_used)
        lists = 1 + len(kept) % 6
        if index.nprobe is not None:
            index.nprobe = lists
        similarity, ids = index.search_one(query, k)
        assert similarity.shape == ids.shape == (k,)
        assert torch.get_num_threads() == cores_used
        kept.append((index.nprobe, query, torch.from_numpy(similarity), torch.from_numpy(ids)))
    for lists, query, similarity, ids in kept:
        if lists is not None:
            index.nprobe = lists
        expected, there = index.search(query, len(ids))
        torch.testing.assert_close(similarity.sort(descending=True).values, expected[0])
        surely = expected[0] > expected[0][there[0] >= 0].min()
        assert set(ids.tolist()) >= set(there[0][surely].tolist())


def test_one_query_that_is_not_searched_in_arrays(tmp_path):
    index = build(tmp_path, clustered(600, 8), "IVF8,Flat")
    query = clustered(1, 8, seed=1)
    assert index.search_one(query, 600) is not None
    assert index.search_one(query, 601) is None  # hits are missing, for which there is `search`
    assert index.search_one(query.to("meta"), 5) is None
    with pytest.raises(KNNLMError, match="not finite"):
        index.search_one(query * torch.nan, 5)
    with pytest.raises(SearchIndexError, match="8-d keys"):
        index.search_one(query[:, :5], 5)

    class Mine(FaissIndex):
        """With a search of its own, maybe."""

    assert Mine(index.index).search_one(query, 5) is None
    own = faiss.index_factory(8, "IVF1,Flat")
    own.train(np.eye(40, 8, dtype=np.float32))
    own.add_with_ids(np.eye(6, 8, dtype=np.float32), np.array([0, 1, 2, 3, 9_999, 5]))
    with pytest.raises(SearchIndexError, match="names entry 9999, it holds 6"):
        FaissIndex(own).search_one(query, 6)


def test_threads_do_not_share_what_one_query_needs(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)
    index = build(tmp_path, clustered(600, 8), "RR8,IVF8,SQ8")
    index.nprobe = 4
    queries = clustered(200, 8, seed=1).float()
    expected = index.search(queries, 5)[0].sort(dim=1).values

    def ask(some):
        torch.set_num_threads(2)
        return [torch.from_numpy(index.search_one(queries[i : i + 1], 5)[0]) for i in some]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, [range(0, 200, 3), range(1, 200, 3), range(2, 200, 3)]))
    for first, part in enumerate(found):
        torch.testing.assert_close(torch.stack(part).sort(dim=1).values, expected[first::3])


@pytest.mark.parametrize(
    "spec", ["Flat", "HNSW8", "IVF8,SQ8,Refine(keys)", "IVF8,SQ8,Refine(Flat)", "IVF8,PQ8x4fsr"]
)
def test_others_are_searched_by_one_core(tmp_path, spec, threads, monkeypatch):
    """Of a fast scan of residuals all lists together decide how its tables are rounded."""
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)
    threads(2)
    assert not build(tmp_path, clustered(600, 8), spec).takes_all_cores


@pytest.mark.parametrize("spec", ["IVF8,PQ8x4fs", "IVF8,Flat", "IMI2x4,Flat"])
@pytest.mark.parametrize("k", [1, 3, 300])
def test_a_share_that_finds_nothing(spec, k, threads, monkeypatch):
    """All entries but three are gone, and more lists are asked for than there are."""
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)
    keys = clustered(600, 8).float().numpy()
    own = faiss.index_factory(8, spec)
    own.train(keys)
    own.add(keys[:3])
    own.nprobe = 300
    index = FaissIndex(own)
    assert index._shares(2) == 2
    found = []
    for cores in (1, 2):
        threads(cores)
        found.append(index.search(torch.from_numpy(keys[:1]), k))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1][0, 0] == found[1][1][0, 0] == 0
    assert torch.equal(found[0][1] < 0, found[1][1] < 0)


def test_a_limit_of_codes_is_one_of_all_lists(threads, monkeypatch):
    monkeypatch.setattr(index_faiss, "has_torchs_threads", lambda: True)
    keys = clustered(600, 8).float().numpy()
    own = faiss.index_factory(8, "IVF8,Flat")
    own.train(keys)
    own.add(keys)
    own.nprobe, own.max_codes = 4, 50
    threads(2)
    assert not FaissIndex(own).takes_all_cores


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_whether_threads_are_torchs(first):
    """It depends on which was imported first, and is found out without changing anything."""
    second = {"torch": "faiss", "faiss": "torch"}[first]
    code = (
        f"import {first}, {second}\n"
        "from knnlm_hf.index.faiss_library import has_torchs_threads\n"
        "torch.set_num_threads(2); torch.get_num_threads(); faiss.omp_set_num_threads(3)\n"
        "own = torch.get_num_threads(), faiss.omp_get_max_threads()\n"
        "assert has_torchs_threads() == (own == (3, 3)), own\n"
        "assert own == (torch.get_num_threads(), faiss.omp_get_max_threads())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lists_visited():
    assert default_nprobe(2048, 2_700_000) == 12
    assert default_nprobe(4096, 2_700_000) == 16
    assert default_nprobe(65_536, 1_000_000_000) == 16  # no more
    assert default_nprobe(512, 2_700_000) == 8  # nor fewer
    assert default_nprobe(1024, 60_000) == 172  # which hold 10,078 entries
    assert default_nprobe(7, 60_000) == 7


def test_a_search_sees_what_the_keys_hold_now():
    keys = clustered(100, 8)
    index = refining(keys, "SQ4")
    assert index.search(keys[5:6], 1)[0].item() == 0
    keys[5] += 1
    assert index.search(keys[5:6], 1)[0].item() == 0  # nothing was copied
    assert index.search(keys[5:6] - 1, 1)[0].item() == pytest.approx(-8, abs=0.1)


def test_keys_that_faiss_cannot_read_in_place():
    keys = clustered(120, 8)
    expected = refining(keys, "SQ8").search(keys[:1], 9)
    halves = Rows([keys[:60], keys[60:]])
    for rows in (halves, Keys(keys.double()), Keys(torch.cat([keys, keys], 1)[:, :8])):
        index = refining(keys, "SQ8", rows=rows)
        similarity, ids = index.search(keys[:1], 9)
        assert index._refined is None
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(similarity, expected[0])


@pytest.mark.parametrize("spec", ["IDMap,Flat", "IVF2,Flat"])
def test_an_index_whose_numbers_lead_beyond_the_keys(spec):
    """FAISS would read whatever memory they point to."""
    keys = clustered(90, 4)
    own = faiss.index_factory(4, spec)
    own.train(keys.float().numpy())
    own.add_with_ids(keys.float().numpy(), np.arange(90) * 10**12)
    with pytest.raises(SearchIndexError, match=r"names entry \d+0{12}, it holds 90"):
        FaissIndex(own, keys=Keys(keys)).search(keys[:1], 90)


def test_an_index_that_was_added_to():
    keys = clustered(90, 4)
    index = refining(keys, "Flat")
    index.search(keys[:1], 2)
    index.index.add(keys[:1].float().numpy())
    with pytest.raises(IndexError):  # of the keys, in place of reading behind them
        index.search(keys[:1], 91)


def test_a_moved_origin_is_refused_for_inner_products(tmp_path):
    keys = clustered(300, 16)
    ids = build(tmp_path, keys, "PCAR16,Flat", "l2").search(keys[:9].float(), 5)[1]
    expected = np.argsort(-similarities(keys[:9], keys, "l2"), axis=1)[:, :5]
    np.testing.assert_array_equal(ids, expected)
    with pytest.raises(SearchIndexError, match="origin"):
        build(tmp_path, keys, "PCAR16,Flat", "ip")


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dim", [1, 2, 7, 37, 61])
@pytest.mark.parametrize("memory", [0, 60_000 * 25, 1 << 40])
def test_auto_works_in_odd_dimensions(tmp_path, metric, dim, memory):
    keys = clustered(800, dim)
    spec = (
        choose(60_000, dim, metric, memory=memory)
        .replace("IVF256", "IVF8")
        .replace("IVF1024", "IVF32")
    )
    ids = build(tmp_path, keys, spec, metric).search(keys[:5].float(), 10)[1]
    assert ids.shape == (5, 10)
    assert (ids >= 0).all()
    truth = similarities(keys[:5], keys, metric)
    best = np.sort(truth, axis=1)[:, -10:].mean()
    found = np.take_along_axis(truth, ids.numpy(), axis=1).mean()
    assert best - found <= 0.25 * (best - truth.mean())


def test_auto_chooses_by_size_and_memory():
    assert choose(1000, 64) == "exact"
    assert choose(60_000, 256, memory=1 << 40) == "RR256,IVF1024(PQ256x4fs),PQ256x4fs"
    assert choose(2_700_000, 256, memory=1 << 40) == "RR256,IVF4096(PQ256x4fs),PQ256x4fs"
    assert choose(2_700_000, 256, "ip", memory=1 << 40) == "RR256,IVF2048,PQ256x4fs"
    assert choose(2_700_000, 255, memory=1 << 40) == "RR255,IVF4096(PQ255x4fs),PQ255x4fs"
    assert choose(2_700_000, 16, memory=1 << 40) == "IVF2048,SQ8"
    assert choose(103_000_000, 1024, memory=50 << 30) == "RR1024,IVF16384(PQ1024x4fs),PQ1024x4fs"
    assert choose(103_000_000, 1023, memory=49 << 30) == "RR1024,IVF8192,PQ512x4fsr"
    assert choose(103_000_000, 1022, memory=20 << 30) == "RR1024,IVF8192,PQ256x4fsr"


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_autos_similarities_hold_where_few_directions_vary_most(tmp_path, metric):
    scale = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    scale[:2] *= 20
    keys = (clustered(3000, 64) * scale).half()
    auto = choose(60_000, 64, metric, memory=1 << 40)
    auto = auto.replace("IVF1024", "IVF32").replace("IVF256", "IVF8")

    def error(spec):
        return build(tmp_path, keys, spec, metric).info.self_check["distance_error"]

    assert error(auto) < 0.03
    assert error(auto.removeprefix("RR64,")) > 3 * error(auto)


def test_auto_refines_where_its_codes_are_too_coarse(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "EXACT_BELOW", 100)
    monkeypatch.setattr(auto, "_FEWEST_CODED", 32)
    monkeypatch.setattr(selfcheck, "_K", 8)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 64, generator=generator)
    spread = centres[torch.randint(200, (2000,), generator=generator)]
    for noise, refines in ((1.0, False), (0.02, True)):
        keys = (spread + noise * torch.randn(2000, 64, generator=generator)).half()
        index = build(tmp_path, keys, "auto")
        assert index.info.factory == "RR64,IVF64(PQ64x4fs),PQ64x4fs" + ",Refine(keys)" * refines
        assert (index.info.spec, index.scores_are_exact) == ("auto", refines)
        assert index.info.self_check["distance_error"] < 0.05
        similarity, ids = index.search(keys[:70].float(), 10)
        if refines:
            truth = np.take_along_axis(similarities(keys[:70], keys, "l2"), ids.numpy(), axis=1)
            np.testing.assert_allclose(similarity, truth, rtol=1e-3, atol=1e-3)
    assert auto.must_refine({"distance_error": 0.2}, 10, memory=10)
    assert not auto.must_refine({"distance_error": 0.2}, 11, memory=10)
    assert not auto.must_refine({"queries": 0}, 1, memory=10)


@pytest.mark.parametrize("spec", ["IVF8,SQ8", "RR16,IVF8,PQ16x4fs", "HNSW8"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_searches_for_itself(tmp_path, spec, again):
    index = build(tmp_path, clustered(600, 16), spec)
    queries = clustered(70, 16, seed=1).float()
    expected = index.search(queries, 9)
    twin = again(index)
    for got, there in zip(twin.search(queries, 9), expected, strict=True):
        torch.testing.assert_close(got, there)
    if twin.nprobe is not None:
        twin.nprobe = 1
        assert index.nprobe != 1
        assert not torch.equal(twin.search(queries, 99)[1], index.search(queries, 99)[1])


def test_a_user_s_index_need_not_count_behind_its_transform():
    keys = clustered(300, 8).float().numpy()
    own = faiss.index_factory(8, "OPQ4,IVF4,Flat")
    own.train(keys)
    own.add(keys)
    faiss.extract_index_ivf(own).ntotal = 0
    np.testing.assert_array_equal(
        FaissIndex(own).search(torch.from_numpy(keys[:3]), 3)[1], own.search(keys[:3], 3)[1]
    )


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("spec", ["RR16,IVF8,Flat", "PCA16,RR16,IVF8,Flat", "RR16,IVF8,PQ16x4fs"])
def test_moved_queries_find_the_same_in_a_batch_as_alone(tmp_path, spec, metric):
    if metric == "ip":
        spec = spec.removeprefix("PCA16,")
    keys = clustered(900, 16)
    index = build(tmp_path, keys, spec, metric, nprobe=2)
    queries = clustered(130, 16, seed=1).float()
    batch = index.search(queries, 20)
    for row, query in enumerate(queries):
        alone = index.search(query[None], 20)
        torch.testing.assert_close(batch[0][row], alone[0][0], rtol=1e-5, atol=1e-3)
    if spec.endswith("Flat"):
        true = np.take_along_axis(similarities(queries, keys, metric), batch[1].numpy(), axis=1)
        np.testing.assert_allclose(batch[0], true, rtol=1e-4, atol=1e-3)


def test_missing_hits_are_last_and_marked(tmp_path):
    keys = clustered(400, 8)
    index = build(tmp_path, keys, "IVF16,Flat", nprobe=1)
    similarity, ids = index.search(keys[:6].float(), 200)
    missing = ids < 0
    assert missing.any()
    assert (similarity[missing] == -torch.inf).all()
    assert similarity[~missing].isfinite().all()
    assert (missing.long().diff(dim=1) >= 0).all()
    refined = FaissIndex(index.index, keys=Keys(keys)).search(keys[:6].float(), 200)
    assert torch.equal(refined[1] < 0, missing)
    assert (refined[0][missing] == -torch.inf).all()


@pytest.mark.parametrize("spec", ["Flat", "IVF2,PQ4x4fs", "PQ4x4,Refine(keys)"])
def test_more_neighbours_than_entries(tmp_path, spec):
    keys = clustered(40, 8)
    similarity, ids = build(tmp_path, keys, spec).search(keys[:3].float(), 64)
    assert (ids[:, :40].sort(dim=1).values == torch.arange(40)).all()
    assert (ids[:, 40:] == -1).all()
    assert (similarity[:, 40:] == -torch.inf).all()


def test_a_search_leaves_torch_its_threads(tmp_path):
    index = build(tmp_path, clustered(40, 8), "Flat")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        index.search(torch.zeros(1, 8), 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_one_entry_and_no_query(tmp_path):
    index = build(tmp_path, torch.ones(1, 5), "Flat")
    similarity, ids = index.search(torch.zeros(1, 5), 2)
    assert (similarity.tolist(), ids.tolist()) == ([[-5.0, -torch.inf]], [[0, -1]])
    assert index.search(torch.zeros(0, 5), 2)[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(tmp_path, dtype):
    keys = clustered(300, 16)
    index = build(tmp_path, keys, "Flat")
    queries = clustered(4, 16, seed=1, dtype=dtype)
    similarity, ids = index.search(queries, 5)
    truth = similarities(queries.float(), keys, "l2")
    np.testing.assert_array_equal(ids, np.argsort(-truth, axis=1)[:, :5])
    np.testing.assert_allclose(similarity, -np.sort(-truth, axis=1)[:, :5], rtol=1e-4)


def test_refined_near_duplicates_keep_their_digits(tmp_path):
    torch.manual_seed(0)
    keys = 1000 + 0.01 * torch.randn(300, 16)
    similarity, ids = build(tmp_path, keys, "Flat,Refine(keys)").search(keys[:4] + 0.001, 10)
    truth = similarities(keys[:4] + 0.001, keys, "l2")
    expected = np.take_along_axis(truth, ids.numpy(), axis=1)
    np.testing.assert_allclose(similarity, expected, rtol=1e-5)


def test_same_seed_same_index(tmp_path):
    keys = clustered(600, 16)
    found = [
        build(tmp_path / str(i), keys, "IVF4,PQ4x4", seed=seed).info.sha256
        for i, seed in enumerate([0, 0, 1])
    ]
    assert found[0] == found[1] != found[2]


def test_the_training_sample_is_drawn_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("knnlm_hf.index.faiss_build._TRAIN_LEAST", 100)
    keys = clustered(600, 16)
    found = [
        build(tmp_path / str(i), keys, "PQ4x4", seed=seed).info.sha256
        for i, seed in enumerate([0, 0, 1])
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("spec", ["PQ4x4", "IVF4,PQ4x4", "RR16,IVF4,PQ4x4"])
def test_centroids_are_not_sorted_for_a_filter_that_no_search_uses(tmp_path, spec):
    keys = clustered(600, 16)
    plain, never = (build(tmp_path / one, keys, one).index for one in (spec, spec + "np"))
    assert np.array_equal(faiss.serialize_index(plain), faiss.serialize_index(never))
    sorts = faiss.index_factory(16, spec)
    sorts.train(keys.float().numpy())
    sorts.add(keys.float().numpy())
    assert not np.array_equal(faiss.serialize_index(plain), faiss.serialize_index(sorts))


def test_a_graph_is_searched_as_far_as_k(tmp_path):
    keys = clustered(1000, 16)
    ids = build(tmp_path, keys, "HNSW16").search(keys[:8].float(), 500)[1]
    nearest = np.argsort(-similarities(keys[:8], keys, "l2"), axis=1)[:, :500]
    found = [np.isin(near, row).mean() for row, near in zip(ids.numpy(), nearest, strict=True)]
    assert np.mean(found) > 0.9


def test_self_check_drops_each_query_by_its_id():
    own = torch.tensor([7, 3])
    similarity = torch.tensor([[0.0, 0.0, -2.0], [-1.0, -2.0, -3.0]])
    ids = torch.tensor([[5, 7, 1], [4, 5, 6]])  # the first found a twin before itself
    kept, kept_ids = selfcheck._without(own, similarity, ids)
    assert kept_ids.tolist() == [[5, 1], [4, 5]]
    assert kept.tolist() == [[0.0, -2.0], [-1.0, -2.0]]


def test_nprobe(tmp_path):
    keys = clustered(400, 8)
    index = build(tmp_path, keys, "IVF16,Flat", nprobe=3)
    assert index.nprobe == index.info.nprobe == 3
    index.nprobe = 16
    truth = similarities(keys[:5], keys, "l2")
    ids = index.search(keys[:5].float(), 30)[1]
    np.testing.assert_array_equal(ids.sort(dim=1).values, np.sort(np.argsort(-truth)[:, :30]))
    for wrong in (0, 17, 1.5):
        with pytest.raises(SearchIndexError, match="from 1 to 16"):
            index.nprobe = wrong
    flat = build(tmp_path, keys, "Flat")
    assert flat.nprobe is None
    with pytest.raises(SearchIndexError, match="no inverted lists"):
        flat.nprobe = 2


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("nonsense", "'nonsense'.*FAISS factory string"),
        ("", "FAISS factory string"),
        ("PQ5", "'PQ5' for 16-d keys"),
        ("IVF1000,Flat", "1000 lists.*200 entries"),
        ("PQ4x8", "200 16-d entries"),
        ("LSH", r"Refine\(keys\)"),
        ("L2norm,Flat", r"Refine\(keys\)"),
        ("Refine(keys)", "Refine"),
    ],
)
def test_what_cannot_be_built_says_so_and_leaves_nothing(tmp_path, spec, complaint):
    with pytest.raises(SearchIndexError, match=complaint) as caught:
        build(tmp_path, clustered(200, 16), spec)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_self_check_is_measured(tmp_path):
    keys = clustered(500, 16)
    check = build(tmp_path, keys, "Flat").info.self_check
    assert check["recall"] > 0.999
    assert check["distance_error"] < 1e-4
    assert check["entropy"] == pytest.approx(check["exact_entropy"], abs=1e-3)
    assert check["temperature"] == pytest.approx(check["exact_temperature"], rel=1e-3)
    truth = similarities(keys, keys, "l2")
    poor = build(tmp_path, keys, "IVF8,PQ4x4fs", nprobe=1)
    assert poor.info.self_check["recall"] < 0.5
    assert poor.info.self_check["distance_error"] > 0.01
    assert 0 < check["temperature"] < -truth.min()


def test_not_a_number(tmp_path):
    index = build(tmp_path, clustered(50, 4), "Flat")
    with pytest.raises(KNNLMError, match="not finite"):
        index.search(torch.full((1, 4), torch.nan), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["IVF8,PQ4x4,Refine(keys)", "IVF8,Flat", "exact"])
def test_in_any_order_they_are_the_same_neighbours(tmp_path, spec, dtype):
    keys = clustered(300, 8, dtype=dtype)
    index = build(tmp_path, keys, spec)
    queries = keys[::30].float() + 0.1
    similarity, ids = index.search(queries, 40)
    assert bool((similarity.diff(dim=1) <= 0).all())
    unordered, same_ids = index.search(queries, 40, ordered=False)
    nearest_first = unordered.sort(dim=1, descending=True)
    assert torch.equal(nearest_first.values, similarity)
    assert torch.equal(same_ids.sort(dim=1).values, ids.sort(dim=1).values)
    is_sorted = torch.equal(unordered, similarity)
    assert is_sorted == (not spec.endswith("Refine(keys)") or dtype == torch.float32)


def test_a_faiss_index_of_ones_own():
    own = faiss.IndexFlatIP(3)
    own.add(np.eye(3, dtype=np.float32))
    index = FaissIndex(own)
    assert index.metric == "ip"
    assert index.search(torch.tensor([[0.0, 2.0, 1.0]]), 2)[1].tolist() == [[1, 2]]
    with pytest.raises(SearchIndexError, match="measures ip, expected l2"):
        FaissIndex(own, "l2")
    with pytest.raises(SearchIndexError, match="FAISS metric"):
        FaissIndex(faiss.IndexFlat(3, faiss.METRIC_L1))


def test_without_faiss(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_faiss(name, *rest, **options):
        if name == "faiss" or name.startswith("faiss."):
            raise ImportError(name)
        return real_import(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(builtins, "__import__", no_faiss)
    keys = clustered(100, 4)
    assert build(tmp_path, keys, "exact").search(keys[:1].float(), 1)[1].tolist() == [[0]]
    with pytest.raises(SearchIndexError, match=r"knnlm-hf\[cpu\].*knnlm-hf\[gpu\]"):
        build(tmp_path, keys, "Flat")


def test_ids_that_are_no_entries(tmp_path):
    own = faiss.index_factory(4, "IDMap,Flat")
    own.add_with_ids(np.eye(4, dtype=np.float32), np.array([0, 1, 2, 10**12]))
    with pytest.raises(SearchIndexError, match=r"names entry 1000000000000, it holds 4"):
        FaissIndex(own).search(torch.eye(4), 2)
