"""p_kNN of every token for a whole grid of temperatures and k, without searching again.

Shape suffixes: N token (n of a block), T temperature, K neighbour or k, H hit, a neighbour that
carries the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.memory import Evidence
from knnlm_hf.parallel import over_blocks

_SQUARINGS = 4
_LOG2_E = math.log2(math.e)
_BLOCK = 1 << 20
"""Similarities in a block: 4 MB. Fewer would stay in cache, but threads wait between operations."""


def knn_probabilities(
    found: Evidence, ks: list[int], temperatures: Sequence[float], match_weight: float = 0.0
) -> Tensor:
    """p_kNN(target) for each temperature and k: (len(temperatures), len(ks), N) float32.

    A block of rows stays in cache for all temperatures. NaN where a query has no hit.
    `match_weight` is γ, for evidence with `matches`.
    """
    assert found.similarity is not None
    assert found.is_target is not None
    all_similarity_NK, all_is_target_NK = found.similarity, found.is_target
    count = len(all_similarity_NK)
    matches_NK = found.matches if match_weight else None
    result_TKN = torch.empty(len(temperatures), len(ks), count)
    widths = [last - first for first, last in pairwise([0, *ks])]

    def work(block: slice) -> None:
        similarity_nK = all_similarity_NK[block, : ks[-1]]
        relative_nK = similarity_nK - similarity_nK[:, :1]  # NaN throughout where there is no hit
        bonus_nK = None  # e^(γ·m), at least 1, so that no sum of weights vanishes
        if matches_NK is not None:
            bonus_nK = (matches_NK[block, : ks[-1]] * match_weight).exp_()
        hits = _Hits(relative_nK, all_is_target_NK[block, : ks[-1]], ks, bonus_nK)
        total_TKn = torch.empty(len(temperatures), len(ks), len(relative_nK))
        outs = [total_Kn.unbind() for total_Kn in total_TKn.unbind()]
        for i, weights_nK in _weights(relative_nK, temperatures):
            if bonus_nK is not None:
                weights_nK = weights_nK * bonus_nK
            for segment_nk, out_n in zip(torch.split(weights_nK, widths, 1), outs[i], strict=True):
                torch.sum(segment_nk, 1, out=out_n)
        result_TKN[:, :, block] = hits.weights(temperatures) / total_TKn.cumsum(1)

    over_blocks(work, count, max(1, _BLOCK // ks[-1]))
    return result_TKN


def _weights(relative: Tensor, temperatures: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, exp(relative / temperatures[i])) from the hottest to the coldest.

    subtle: halving t squares the weights, four times cheaper than an exponential; a grid of
    2^(step/n) needs few exponentials. Squared at most `_SQUARINGS` times in a row, which keeps the
    relative error below 1e-6. A yielded tensor is valid until the next one.
    """
    chains: list[tuple[float, int, Tensor]] = []
    for i in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
        t = temperatures[i]
        hotter = (
            n for n, (at, depth, _) in enumerate(chains)
            if depth < _SQUARINGS and math.isclose(at, 2 * t, rel_tol=1e-9)
        )  # fmt: skip
        n = next(hotter, None)
        if n is None:
            weights, depth = torch.mul(relative, _LOG2_E / t).exp2_(), 0  # faster than exp
        else:
            _, depth, weights = chains.pop(n)
            weights.square_()
            depth += 1
        chains = [chain for chain in chains if chain[0] <= 2 * t * (1 + 1e-9)]
        chains.append((t, depth, weights))
        yield i, weights


class _Hits:
    """The neighbours of a block that carry their query's target: few, so kept as a ragged list."""

    def __init__(
        self, relative_nK: Tensor, is_target_nK: Tensor, ks: list[int], bonus_nK: Tensor | None
    ) -> None:
        # numpy finds the few that are set five times as fast.
        place_H = torch.from_numpy(np.flatnonzero(is_target_nK.numpy()))
        row_H, column_H = place_H // is_target_nK.shape[1], place_H % is_target_nK.shape[1]
        self.relative_H = relative_nK[row_H, column_H]
        self.bonus_H = None if bonus_nK is None else bonus_nK[row_H, column_H]
        self.shape = (len(ks), relative_nK.shape[0])
        # Neighbours are sorted: a query's hits under each k are a running sum over segments.
        segment_H = torch.bucketize(column_H, torch.tensor(ks), right=True)
        runs, self.starts = np.unique((row_H * len(ks) + segment_H).numpy(), return_index=True)
        self.rows, self.segments = np.divmod(runs, len(ks))

    def weights(self, temperatures: Sequence[float]) -> Tensor:
        """(T, len(ks), n) summed weight of the hits among the first k neighbours."""
        carried_TKn = np.zeros((len(temperatures), *self.shape), dtype=np.float32)
        for i, weights_H in _weights(self.relative_H, temperatures):
            if self.bonus_H is not None:
                weights_H = weights_H * self.bonus_H
            if len(self.starts):
                sums = np.add.reduceat(weights_H.numpy(), self.starts)
                carried_TKn[i, self.segments, self.rows] = sums
        return torch.from_numpy(carried_TKn).cumsum(1)
