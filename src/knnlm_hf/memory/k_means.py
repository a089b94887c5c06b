"""Lloyd's k-means over stored keys, in torch, read from the disk a block at a time.

Each round assigns every row to its nearest centroid (squared Euclidean distance, the lower number
on a tie) and moves each centroid to the mean of its rows. A centroid without rows is put on one of
the rows that are farthest from theirs. Sums are in float64, so that the same seed gives the same
centroids whatever the blocks.

Shape suffixes: N row, n rows of a block, J centroid, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.progress import bar
from knnlm_hf.types import KeyRows, check_count, is_finite

_DISTANCES = 1 << 23  # rows × centroids at a time


def k_means(
    rows: KeyRows,
    ids_N: Tensor,
    clusters: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[Tensor, float]:
    """Centroids of some rows, begun from a random sample of them.

    Args:
        rows: the stored keys.
        ids_N: (N,) numbers of the rows to use, ascending for speed.
        clusters: how many, ≥ 1; at most N are made.
        iterations: rounds, ≥ 1; fewer where nothing moves any more.
        seed: of the sample.
        device: where distances are computed.
        progress: show progress on stderr.

    Returns:
        (J, D) float32 on `device`, and the mean squared distance of a row in the last round. Where
        there are fewer different rows than clusters, some centroids have no row.

    Raises:
        SettingError: clusters or iterations below 1.
        KNNLMError: no rows, or one that is not finite.
    """
    count = min(check_count("clusters", clusters), len(ids_N))
    if count == 0:
        raise KNNLMError("there are no keys to make centroids of")
    order_N = torch.randperm(len(ids_N), generator=torch.Generator().manual_seed(seed))
    centroids_JD = rows[ids_N[order_N[:count]].sort().values].float().to(device)
    spread = 0.0
    with bar(progress) as shown:
        task = shown.add_task("k-means", total=check_count("iterations", iterations), rate="")
        for _ in range(iterations):
            before_JD = centroids_JD
            centroids_JD, spread = _move(rows, ids_N, before_JD)
            shown.update(task, advance=1, rate=f"mean squared distance {spread:.4g}")
            if torch.equal(before_JD, centroids_JD):
                break
    return centroids_JD, spread


def nearest(
    rows: KeyRows, ids_N: Tensor, centroids_JD: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of rows with their nearest centroids, in the order of `ids_N`.

    Yields:
        Numbers (n,) on the CPU; rows (n, D) float32, centroids (n,) int64 and squared distances
        (n,) float32 on the centroids' device.
    """
    norms_J = centroids_JD.square().sum(1)
    for ids_n in torch.split(ids_N, max(1, _DISTANCES // len(centroids_JD))):
        rows_nD = rows[ids_n].to(centroids_JD.device, torch.float32)
        if not is_finite(rows_nD):
            raise KNNLMError("a key is not finite: build the store again")
        # |x − c|² less |x|², which is the same for all centroids.
        relative_nJ = torch.addmm(norms_J, rows_nD, centroids_JD.T, alpha=-2)
        least_n, cluster_n = relative_nJ.min(1)
        yield ids_n, rows_nD, cluster_n, (least_n + rows_nD.square().sum(1)).clamp_(min=0)


def _move(rows: KeyRows, ids_N: Tensor, centroids_JD: Tensor) -> tuple[Tensor, float]:
    """One round: the new centroids, and the mean squared distance to the old ones."""
    sums_JD = torch.zeros_like(centroids_JD, dtype=torch.float64)
    counts_J = torch.zeros(len(centroids_JD), dtype=torch.int64, device=centroids_JD.device)
    distances = []
    for _, rows_nD, cluster_n, distance_n in nearest(rows, ids_N, centroids_JD):
        sums_JD.index_add_(0, cluster_n, rows_nD.double())
        counts_J += cluster_n.bincount(minlength=len(counts_J))
        distances.append(distance_n.cpu())
    distance_N = torch.cat(distances)
    moved_JD = (sums_JD / counts_J.clamp(min=1)[:, None]).float()
    empty_j = (counts_J == 0).nonzero()[:, 0]
    if len(empty_j):
        far_j = distance_N.topk(len(empty_j)).indices
        moved_JD[empty_j] = rows[ids_N[far_j]].to(moved_JD)
    return moved_JD, distance_N.double().mean().item()
