"""k-means against a loop in float64, and on clusters that can be seen."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import k_means as module
from knnlm_hf.memory.k_means import k_means, nearest


def run(rows, clusters, **options):
    return k_means(tiny.Keys(rows), torch.arange(len(rows)), clusters, progress=False, **options)


def lloyd(rows, clusters, iterations, seed):
    """Row by row, in float64, from the same sample."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows.double().numpy()
    centroids = rows[np.sort(order[:clusters].numpy())]
    for _ in range(iterations):
        far = np.array([[np.square(row - c).sum() for c in centroids] for row in rows])
        own, least = far.argmin(1), far.min(1)
        counts = np.bincount(own, minlength=len(centroids))
        farthest = iter(np.argsort(-least, kind="stable"))
        centroids = np.array(
            [rows[own == j].mean(0) if counts[j] else rows[next(farthest)] for j in range(clusters)]
        )
    return centroids, least.mean()


def test_two_pairs_by_hand():
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    centroids, spread = run(rows, 2, seed=1)  # begins with one row of each pair
    assert sorted(centroids.tolist()) == [[0.0, 1.0], [10.0, 1.0]]
    assert spread == 1.0


@pytest.mark.parametrize("block", [1, 100, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_the_loop(block, dtype, monkeypatch):
    monkeypatch.setattr(module, "_DISTANCES", block)
    rows = torch.randn(57, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    centroids, spread = run(rows, 7, iterations=4, seed=3)
    expected, expected_spread = lloyd(rows, 7, 4, 3)
    np.testing.assert_allclose(centroids.double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert spread == pytest.approx(expected_spread, rel=1e-4)
    assert centroids.dtype == torch.float32


def test_a_centroid_without_rows_moves_to_the_farthest():
    # Most samples are two equal rows, so that the second centroid has no row.
    rows = torch.tensor([[50.0]] * 30 + [[51.0], [150.0]])
    starts = [run(rows, 2, iterations=1, seed=seed)[0][:, 0].tolist() for seed in range(9)]
    assert sum(start[1] == 150.0 for start in starts) > 5
    for seed in range(9):
        centroids, spread = run(rows, 2, iterations=9, seed=seed)
        assert sorted(centroids[:, 0].tolist()) == pytest.approx([50 + 1 / 31, 150.0])
        assert spread < 0.05


def test_the_distance_never_grows():
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    spreads = [run(rows, 20, iterations=n)[1] for n in range(1, 8)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(spreads))
    assert spreads[-1] < 0.9 * spreads[0]


def test_more_clusters_than_different_rows():
    centroids, spread = run(torch.tensor([[1.0], [1.0], [5.0]]), 9, iterations=5)
    assert len(centroids) == 3
    assert {1.0, 5.0} <= set(centroids[:, 0].tolist())
    assert spread == 0


def test_only_the_rows_asked_for():
    rows = torch.tensor([[0.0], [1e6], [2.0]])
    centroids, _ = k_means(tiny.Keys(rows), torch.tensor([0, 2]), 1, progress=False)
    assert centroids.tolist() == [[1.0]]


def test_ties_go_to_the_lower_number():
    centroids = torch.tensor([[1.0], [-1.0], [1.0]])
    ids, rows, cluster, distance = next(
        iter(nearest(tiny.Keys(torch.tensor([[0.0], [3.0]])), torch.arange(2), centroids))
    )
    assert (ids.tolist(), rows.tolist()) == ([0, 1], [[0.0], [3.0]])
    assert cluster.tolist() == [0, 0]
    assert distance.tolist() == [1.0, 4.0]


def test_the_seed_decides():
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    first, again, other = (run(rows, 9, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_input():
    rows = torch.zeros(4, 2)
    for options in ({"clusters": 0}, {"clusters": 1.5}, {"clusters": 2, "iterations": 0}):
        with pytest.raises(SettingError):
            run(rows, **options)
    with pytest.raises(KNNLMError, match="no keys"):
        k_means(tiny.Keys(rows), torch.empty(0, dtype=torch.int64), 2, progress=False)
    with pytest.raises(KNNLMError, match="not finite"):
        run(torch.tensor([[1.0], [torch.nan], [2.0]]), 2)
