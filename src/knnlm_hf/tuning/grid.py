"""p_kNN of every token for a whole grid of temperatures and k, without searching again.

Shape suffixes: N token (n of a block), T temperature, C chain of them, K neighbour or k, H hit, a
neighbour that carries the target, S the hits of one token between one k and the next.
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
_BLOCK = 1 << 21
"""Weights worked on at a time: 8 MB. Fewer stay in cache, but threads wait between operations."""


def knn_probabilities(
    found: Evidence, ks: list[int], temperatures: Sequence[float], match_weight: float = 0.0
) -> Tensor:
    """p_kNN(target) for each temperature and k: (len(temperatures), len(ks), N) float32.

    NaN where a query has no hit. `match_weight` is γ, for evidence with `matches`.
    """
    assert found.similarity is not None
    assert found.is_target is not None
    all_similarity_NK, all_is_target_NK = found.similarity, found.is_target
    count = len(all_similarity_NK)
    matches_NK = found.matches if match_weight else None
    result_TKN = torch.empty(len(temperatures), len(ks), count, dtype=torch.float32)
    widths = [last - first for first, last in pairwise([0, *ks])]
    chains = _chains(temperatures)

    def work(block: slice) -> None:
        similarity_nK = all_similarity_NK[block, : ks[-1]]
        relative_nK = similarity_nK - similarity_nK[:, :1]  # NaN throughout where there is no hit
        bonus_nK = None  # e^(γ·m), at least 1, so that no sum of weights vanishes
        if matches_NK is not None:
            bonus_nK = (matches_NK[block, : ks[-1]] * match_weight).exp_()
        hits = _Hits(relative_nK, all_is_target_NK[block, : ks[-1]], ks, bonus_nK)
        total_TKn = torch.empty_like(result_TKN[:, :, block])
        for at, weights_CnK in _weights(relative_nK, temperatures, chains):
            if bonus_nK is not None:
                weights_CnK = weights_CnK * bonus_nK
            segments = torch.split(weights_CnK, widths, 2)
            total_TKn[at] = torch.stack([segment_Cnk.sum(2) for segment_Cnk in segments], 1)
        result_TKN[:, :, block] = hits.weights(temperatures, chains) / total_TKn.cumsum(1)

    over_blocks(work, count, max(1, _BLOCK // (ks[-1] * len(chains))))
    return result_TKN


def _chains(temperatures: Sequence[float]) -> list[list[int]]:
    """Places in `temperatures`, each with half the temperature before it; the longest chain first.

    subtle: halving t squares the weights, many times cheaper than an exponential; a grid of
    2^(step/n) needs few exponentials. Squared at most `_SQUARINGS` times in a row, which keeps the
    relative error below 1e-6.
    """
    chains: list[list[int]] = []
    for i in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
        hotter = (
            chain for chain in chains
            if len(chain) <= _SQUARINGS
            and math.isclose(temperatures[chain[-1]], 2 * temperatures[i], rel_tol=1e-9)
        )  # fmt: skip
        chain = next(hotter, None)
        if chain is None:
            chains.append([i])
        else:
            chain.append(i)
    return sorted(chains, key=len, reverse=True)


def _weights(
    relative: Tensor, temperatures: Sequence[float], chains: list[list[int]]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield exp(relative / t), (C, *shape), of one t of each chain, and their places.

    What is yielded is valid until the next is.
    """
    hottest = [_LOG2_E / temperatures[chain[0]] for chain in chains]
    scale_C = torch.tensor(hottest, dtype=torch.float32)
    weights = (relative * scale_C.view(-1, *[1] * relative.ndim)).exp2_()  # faster than exp
    yield [chain[0] for chain in chains], weights
    for step in range(1, len(chains[0])):
        at = [chain[step] for chain in chains if len(chain) > step]
        weights = weights[: len(at)].square_()
        yield at, weights


class _Hits:
    """The neighbours of a block that carry their query's target: few, so kept as a ragged list."""

    def __init__(
        self, relative_nK: Tensor, is_target_nK: Tensor, ks: list[int], bonus_nK: Tensor | None
    ) -> None:
        rows, width = is_target_nK.shape
        # numpy finds the few that are set five times as fast.
        place_H = torch.from_numpy(np.flatnonzero(is_target_nK.numpy()))
        self.relative_H = relative_nK.reshape(-1)[place_H]
        self.bonus_H = None if bonus_nK is None else bonus_nK.reshape(-1)[place_H]
        # Neighbours are sorted: a query's hits under each k are a running sum over segments, each
        # of which ends where the next one begins.
        ends_nS = torch.arange(0, rows * width, width)[:, None] + torch.tensor(ks)
        ends = torch.searchsorted(place_H, ends_nS.view(-1)).numpy()
        starts = np.concatenate([[0], ends[:-1]])
        self.segments = np.flatnonzero(starts < ends)
        self.starts = starts[self.segments]
        self.shape = (rows, len(ks))

    def weights(self, temperatures: Sequence[float], chains: list[list[int]]) -> Tensor:
        """(T, len(ks), n) summed weight of the hits among the first k neighbours."""
        carried_TS = np.zeros((len(temperatures), math.prod(self.shape)), dtype=np.float32)
        if len(self.starts):
            for at, weights_CH in _weights(self.relative_H, temperatures, chains):
                if self.bonus_H is not None:
                    weights_CH = weights_CH * self.bonus_H
                sums_CS = np.add.reduceat(weights_CH.numpy(), self.starts, axis=1)
                for i, sums_S in zip(at, sums_CS, strict=True):
                    carried_TS[i, self.segments] = sums_S
        carried_TnK = torch.from_numpy(carried_TS).view(-1, *self.shape)
        return carried_TnK.cumsum(2).transpose(1, 2)
