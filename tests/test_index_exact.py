"""Exact search against brute force in float64 numpy, which shares no code with the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Keys

from knnlm_hf.errors import KNNLMError, SearchIndexError, SettingError
from knnlm_hf.index import ExactIndex, exact, rescore


def brute_force(queries, keys, k, metric):
    """Similarities and ids, nearest first, ties to the lower id, in float64."""
    q, x = queries.double().numpy(), keys.double().numpy()
    if metric == "l2":
        similarity = -np.stack([((row - x) ** 2).sum(axis=1) for row in q])
    else:
        similarity = q @ x.T
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, ids, axis=1), ids


def integers(rows, dim, seed, high=3):
    """Small integers: all arithmetic is exact, and there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, (rows, dim), generator=generator).float()


def test_worked_by_hand():
    keys = Keys(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]]))
    queries = torch.tensor([[1.0, 1.0]])
    similarity, ids = ExactIndex(keys, "l2").search(queries, 3)
    assert ids.tolist() == [[2, 0, 1]]
    assert similarity.tolist() == [[-1.0, -2.0, -13.0]]  # −(0+1), −(1+1), −(4+9)
    similarity, ids = ExactIndex(keys, "ip").search(queries, 3)
    assert ids.tolist() == [[1, 2, 0]]
    assert similarity.tolist() == [[7.0, 1.0, 0.0]]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("rows", "dim", "count", "k"),
    [(1, 1, 1, 1), (2, 1, 3, 2), (50, 37, 7, 5), (300, 61, 1, 300), (1000, 16, 20, 100)],
)
def test_ids_and_similarities(metric, rows, dim, count, k):
    torch.manual_seed(rows)
    keys, queries = torch.randn(rows, dim), torch.randn(count, dim)
    similarity, ids = ExactIndex(Keys(keys), metric).search(queries, k)
    expected, expected_ids = brute_force(queries, keys, k, metric)
    assert similarity.dtype == torch.float32
    assert ids.dtype == torch.int64
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(similarity, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_ties_take_the_lower_id_across_blocks_and_chunks(metric, monkeypatch):
    monkeypatch.setattr(exact, "_BLOCK", 64)
    monkeypatch.setattr(exact, "_SCORES", 64 * 3)  # 3 queries at a time
    monkeypatch.setattr(exact, "_SPARE", 0)
    monkeypatch.setattr(exact, "_GATHER_BYTES", 1000)
    keys, queries = integers(1000, 3, seed=1), integers(10, 3, seed=2)
    for k in (1, 17, 64, 65, 300):
        similarity, ids = ExactIndex(Keys(keys), metric).search(queries, k)
        expected, expected_ids = brute_force(queries, keys, k, metric)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(similarity, expected)


def test_all_keys_equal():
    keys = Keys(torch.full((500, 4), 2.0))
    similarity, ids = ExactIndex(keys, "l2").search(torch.zeros(2, 4), 100)
    assert ids.tolist() == [list(range(100))] * 2
    assert (similarity == -16).all()


def test_more_neighbours_than_keys():
    keys = Keys(integers(3, 2, seed=0))
    similarity, ids = ExactIndex(keys, "l2").search(integers(4, 2, seed=1), 5)
    assert (ids[:, :3].sort(dim=1).values == torch.arange(3)).all()
    assert (ids[:, 3:] == -1).all()
    assert (similarity[:, 3:] == -torch.inf).all()
    assert similarity[:, :3].isfinite().all()


def test_no_keys_and_no_queries():
    similarity, ids = ExactIndex(Keys(torch.empty(0, 2)), "l2").search(torch.zeros(1, 2), 2)
    assert (similarity.tolist(), ids.tolist()) == ([[-torch.inf] * 2], [[-1, -1]])
    similarity, ids = ExactIndex(Keys(torch.ones(3, 2)), "ip").search(torch.zeros(0, 2), 2)
    assert similarity.shape == ids.shape == (0, 2)


def test_near_duplicates_far_from_the_origin():
    """‖q‖² − 2q·k + ‖k‖² in float32 would lose every digit of these distances."""
    torch.manual_seed(0)
    keys = 1000 + 0.01 * torch.randn(400, 16)
    queries = keys[:5] + 0.001
    similarity, ids = ExactIndex(Keys(keys), "l2").search(queries, 20)
    expected, expected_ids = brute_force(queries, keys, 20, "l2")
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(similarity, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_half_precision_is_summed_in_float32(dtype, metric):
    keys = (50 * integers(200, 64, seed=3)).to(dtype)  # squares overflow float16
    queries = (50 * integers(6, 64, seed=4)).to(dtype)
    similarity, ids = ExactIndex(Keys(keys), metric).search(queries, 10)
    expected, expected_ids = brute_force(queries, keys, 10, metric)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarity, expected)


def test_autocast_does_not_reach_the_search():
    torch.manual_seed(0)
    keys, queries = torch.randn(300, 32), torch.randn(3, 32)
    plain = ExactIndex(Keys(keys), "ip").search(queries, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ExactIndex(Keys(keys), "ip").search(queries, 8)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rescore(metric, dtype, monkeypatch):
    monkeypatch.setattr(exact, "_GATHER_BYTES", 4 * 8 * 5 * 2)  # 2 queries at a time
    keys, queries = integers(30, 8, seed=5).to(dtype), integers(7, 8, seed=6)
    before = keys.clone()
    ids = torch.randint(0, 30, (7, 5), generator=torch.Generator().manual_seed(7))
    ids[2, 3] = ids[6, 0] = -1
    similarity = rescore(queries, ids, Keys(keys), metric)
    x, q = keys.double().numpy()[ids], queries.double().numpy()[:, None]
    expected = -((q - x) ** 2).sum(axis=2) if metric == "l2" else (q * x).sum(axis=2)
    expected[2, 3] = expected[6, 0] = -np.inf
    np.testing.assert_array_equal(similarity, expected)
    assert torch.equal(keys, before)
    assert rescore(queries[:0], ids[:0], Keys(keys), metric).shape == (0, 5)


def test_finite_queries_whose_sum_is_not_are_taken():
    index = ExactIndex(Keys(torch.tensor([[3e38, 0.0], [0.0, 3e38]])), "ip")
    _, ids = index.search(torch.tensor([[3e38, 3e38], [3e38, 0.0]]), 1)
    assert ids[1].tolist() == [0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_queries_that_are_not_finite(bad):
    queries = torch.zeros(2, 3)
    queries[1, 2] = bad
    with pytest.raises(KNNLMError, match="not finite"):
        ExactIndex(Keys(torch.ones(4, 3)), "l2").search(queries, 1)


def test_settings_are_checked():
    index = ExactIndex(Keys(torch.ones(4, 3)), "l2")
    with pytest.raises(SettingError, match="k is 0"):
        index.search(torch.zeros(1, 3), 0)
    with pytest.raises(SearchIndexError, match=r"\(1, 5\).*3-d"):
        index.search(torch.zeros(1, 5), 1)
    with pytest.raises(SettingError, match="cosine"):
        ExactIndex(Keys(torch.ones(4, 3)), "cosine")


def test_queries_keep_their_gradient_to_themselves():
    queries = torch.zeros(2, 3, requires_grad=True)
    similarity, _ = ExactIndex(Keys(torch.ones(4, 3)), "l2").search(queries, 2)
    assert not similarity.requires_grad
