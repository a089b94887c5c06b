"""Exact search in plain torch: the oracle of every other index, needing nothing else.

Memory is bounded whatever N and Q: keys stream through in blocks, queries in chunks, and only the
best candidates so far are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnlm_hf.index.base import SearchIndex, missing
from knnlm_hf.types import KeyRows, Metric

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed

_BLOCK = 1 << 15
"""Keys scored at a time."""
_SCORES = 1 << 24
"""Scores (queries × keys) held at a time: 64 MiB."""
_SPARE = 32
"""Candidates kept beyond k, so that rounding in the matrix product cannot lose a neighbour."""
_CENTRE_SAMPLE = 4096
_NO_ID = torch.iinfo(torch.int64).max
_GATHER_BYTES = 1 << 19
"""Float32 rows gathered at a time and thread when rescoring: they stay in each core's own cache."""
_LIKE_THREADS = 16
"""What a GPU counts as there."""


class ExactIndex(SearchIndex):
    """Every key is compared with every query, in float32.

    Candidates come from a matrix product, similarities and order from `rescore`. Ties, at rank k
    too, go to the lower id. The work is done on the queries' device.
    """

    scores_are_exact = True

    def __init__(self, keys: KeyRows, metric: str = "l2") -> None:
        super().__init__(metric, keys.dim)
        self.keys = keys
        self._centre_D: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def _search(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._nearest(queries_QD, k, None)

    def _search_live(self, queries_QD: Tensor, k: int, removed: Removed) -> tuple[Tensor, Tensor]:
        return self._nearest(queries_QD, k, removed)

    def _nearest(
        self, queries_QD: Tensor, k: int, removed: Removed | None
    ) -> tuple[Tensor, Tensor]:
        rows, device = queries_QD.shape[0], queries_QD.device
        live = len(self) - (0 if removed is None else removed.entries)
        if live == 0:
            return missing(rows, k, device)
        wanted = min(k + _SPARE, live)
        ids_QK = self._candidates(queries_QD, wanted, removed)
        similarity_QK = rescore(queries_QD, ids_QK, self.keys, self.metric)
        similarity_QK, ids_QK = order(similarity_QK, ids_QK)
        found = min(k, wanted)
        similarity_Qk, ids_Qk = missing(rows, k, device)
        similarity_Qk[:, :found] = similarity_QK[:, :found]
        ids_Qk[:, :found] = ids_QK[:, :found]
        return similarity_Qk, ids_Qk

    def _candidates(self, queries_QD: Tensor, k: int, removed: Removed | None) -> Tensor:
        """Ids of the k best live keys of each query, unordered, by a matrix product over blocks.

        For l2 the score is 2q·k − ‖k‖², which ranks as −‖q−k‖² does; queries and keys are moved to
        the keys' centre first, or its digits would drown those of the difference.
        """
        rows, device = queries_QD.shape[0], queries_QD.device
        scores_QK, ids_QK = missing(rows, k, device)
        ids_QK.fill_(_NO_ID)
        centre_D = self._centre().to(device)
        queries_QD = queries_QD - centre_D if self.metric == "l2" else queries_QD
        chunk = max(1, _SCORES // _BLOCK)
        for first, block_ND in self.keys.blocks(_BLOCK):
            keys_ND = block_ND.to(device, torch.float32)
            dead_N = (
                None
                if removed is None
                else removed.covers(torch.arange(first, first + len(keys_ND), device=device))
            )
            if self.metric == "l2":
                keys_ND = keys_ND - centre_D
                bias_N = -keys_ND.square().sum(dim=1)
            for start in range(0, rows, chunk):
                part = slice(start, start + chunk)
                if self.metric == "l2":
                    scores_QN = torch.addmm(bias_N, queries_QD[part], keys_ND.T, alpha=2)
                else:
                    scores_QN = queries_QD[part] @ keys_ND.T
                if dead_N is not None:
                    scores_QN.masked_fill_(dead_N, -torch.inf)
                new_QM, new_ids_QM = above(scores_QN, scores_QK[part].amin(dim=1), first)
                merged_QM = torch.cat([scores_QK[part], new_QM], dim=1)
                merged_ids_QM = torch.cat([ids_QK[part], new_ids_QM], dim=1)
                scores_QK[part], where_QK = best(merged_QM, merged_ids_QM, k)
                ids_QK[part] = merged_ids_QM.gather(1, where_QK)
        return ids_QK

    @torch.inference_mode(mode=False)  # it is kept
    def _centre(self) -> Tensor:
        """Mean of a sample of keys, (D,), on a grid so coarse that small integers stay exact."""
        if self._centre_D is None:
            step = max(1, len(self) // _CENTRE_SAMPLE)
            sample_ND = self.keys[torch.arange(0, len(self), step)].float()
            mean_D = sample_ND.mean(dim=0)
            spread = (sample_ND - mean_D).abs().max()
            grid = torch.exp2(spread.log2().ceil() - 3)
            self._centre_D = mean_D if spread == 0 else (mean_D / grid).round() * grid
        return self._centre_D


def above(scores_QN: Tensor, floor_Q: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The scores above each row's floor and their ids, (Q, M), padded with −inf.

    Most blocks hold few candidates, and finding those is much cheaper than a top-k of the block;
    the first one, of a floor of −∞, is returned whole. An equal score stays out: the floor's own
    entry has the lower id.

    Args:
        scores_QN: (Q, N) scores of a block.
        floor_Q: (Q,) the worst candidate so far.
        first: id of the block's first entry.
    """
    if bool((floor_Q == -torch.inf).any()):
        ids_N = torch.arange(first, first + scores_QN.shape[1], device=scores_QN.device)
        return scores_QN, ids_N.expand_as(scores_QN)
    row_S, column_S = (scores_QN > floor_Q[:, None]).nonzero(as_tuple=True)
    count_Q = row_S.bincount(minlength=len(scores_QN))
    place_S = torch.arange(len(row_S), device=row_S.device)
    place_S -= (count_Q.cumsum(dim=0) - count_Q)[row_S]
    new_QM, ids_QM = missing(len(scores_QN), int(count_Q.max()), scores_QN.device)
    new_QM[row_S, place_S] = scores_QN[row_S, column_S]
    ids_QM.fill_(_NO_ID)[row_S, place_S] = column_S + first
    return new_QM, ids_QM


def best(scores_QN: Tensor, ids_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their columns, unordered; ties go to the lower id.

    `torch.topk` breaks ties at rank k arbitrarily, so rows where it had to are taken again.
    """
    values_QK, where_QK = torch.topk(scores_QN, k, dim=1, sorted=False)
    last_Q1 = values_QK.amin(dim=1, keepdim=True)
    tied_QN = scores_QN == last_Q1
    cut_Q = tied_QN.sum(dim=1) > (values_QK == last_Q1).sum(dim=1)
    if cut_Q.any():
        above_RN, tied_RN = scores_QN[cut_Q] > last_Q1[cut_Q], tied_QN[cut_Q]
        by_id_RN = ids_QN[cut_Q].argsort(dim=1)
        rank_RN = torch.empty_like(by_id_RN)
        rank_RN.scatter_(1, by_id_RN, tied_RN.gather(1, by_id_RN).cumsum(dim=1))
        keep_RN = above_RN | (tied_RN & (rank_RN <= k - above_RN.sum(dim=1, keepdim=True)))
        where_QK[cut_Q] = keep_RN.nonzero()[:, 1].view(-1, k)
        values_QK = scores_QN.gather(1, where_QK)
    return values_QK, where_QK


def order(similarity_QK: Tensor, ids_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by similarity, largest first; equal ones by id, lowest first."""
    ids_QK, by_id_QK = ids_QK.sort(dim=1)
    similarity_QK = similarity_QK.gather(1, by_id_QK)
    similarity_QK, by_similarity_QK = similarity_QK.sort(dim=1, descending=True, stable=True)
    return similarity_QK, ids_QK.gather(1, by_similarity_QK)


def rescore(queries_QD: Tensor, ids_QK: Tensor, keys: KeyRows, metric: Metric) -> Tensor:
    """True similarities of given entries, from the stored keys.

    `l2`: −Σ_d (q_d − k_d)², taken by direct difference, so that near-duplicates keep their digits;
    `ip`: Σ_d q_d·k_d. Both in float32; a few queries at a time, never a (Q, K, D) tensor.

    Args:
        queries_QD: (Q, D), of any floating dtype, on any device.
        ids_QK: (Q, K) entry numbers; −1 for a missing hit.
        keys: the stored keys.
        metric: `l2` or `ip`.

    Returns:
        (Q, K) float32 on the queries' device, −inf where the id is −1.
    """
    rows, hits = ids_QK.shape
    device = queries_QD.device
    if ids_QK.numel() == 0:
        return torch.empty(rows, hits, device=device)
    queries_Q1D = queries_QD.detach().float()[:, None]
    ids_QK = ids_QK.cpu()
    has_missing = int(ids_QK.min()) < 0
    known_QK = ids_QK.clamp(min=0) if has_missing else ids_QK
    threads = torch.get_num_threads() if device.type == "cpu" else _LIKE_THREADS
    chunk = max(1, _GATHER_BYTES * threads // (4 * hits * keys.dim))
    # One buffer for all chunks: fresh memory would cost more than the arithmetic.
    buffer_QKD = torch.empty(min(chunk, rows), hits, keys.dim, device=device)
    if rows <= chunk:
        similarity_QK = _compare(queries_Q1D, buffer_QKD.copy_(keys[known_QK]), metric)
    else:
        similarity_QK = torch.empty(rows, hits, device=device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            keys_qKD = buffer_QKD[: min(chunk, rows - start)].copy_(keys[known_QK[part]])
            similarity_QK[part] = _compare(queries_Q1D[part], keys_qKD, metric)
    if has_missing:
        similarity_QK.masked_fill_((ids_QK < 0).to(device), -torch.inf)
    return similarity_QK


def _compare(queries_Q1D: Tensor, keys_QKD: Tensor, metric: Metric) -> Tensor:
    """(Q, K) similarities of each query to its own keys, which are overwritten."""
    if metric == "l2":
        return keys_QKD.sub_(queries_Q1D).square_().sum(2).neg_()
    return keys_QKD.mul_(queries_Q1D).sum(2)
