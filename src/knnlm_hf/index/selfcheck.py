"""Every index is held against exact search on a sample of its own keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnlm_hf.index.base import SearchIndex
from knnlm_hf.index.exact import ExactIndex, rescore
from knnlm_hf.interpolation import default_temperature, knn_log_probs
from knnlm_hf.types import KeyRows

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed

_QUERIES = 256
_COMPARISONS = 1_000_000_000
"""Queries × entries that the exact side may cost; beyond, fewer queries, but at least 16."""
_K = 1024


@torch.no_grad()
def self_check(
    index: SearchIndex,
    keys: KeyRows,
    values: Tensor,
    *,
    seed: int = 0,
    removed: Removed | None = None,
) -> dict[str, float]:
    """Search a sample of the keys in the index and exactly; a key does not count as its own hit.

    Args:
        index: the index to check; it holds `keys`.
        keys: N stored keys.
        values: (N,) their tokens.
        seed: of the sample.
        removed: entries that are neither asked for nor found.

    Returns:
        `queries`, `k`: size of the sample, neighbours of each.
        `recall`: share of the k true nearest that the index found, 0…1.
        `distance_error`: median of |similarity − true similarity of the same entry| ÷ |true|.
        `entropy`, `exact_entropy`: mean entropy (nats) of the kNN distribution over tokens, from
        the index and from exact search, each at its own suggested temperature.
        `temperature`, `exact_temperature`: suggested t, `interpolation.default_temperature`.
        Only `queries`, `k` and `temperature` = 1 where fewer than 2 keys are left.
    """
    live = len(keys) if removed is None else len(keys) - removed.entries
    k = min(_K, live - 1)
    if k < 1:
        return {"queries": 0, "k": 0, "temperature": 1.0}
    size = min(_QUERIES, live, max(16, _COMPARISONS // len(keys)))
    generator = torch.Generator().manual_seed(seed)
    own_Q = torch.randperm(live, generator=generator)[:size]
    if removed is not None:
        own_Q = removed.nth_live(own_Q)
    queries_QD = keys[own_Q].float()
    exact = ExactIndex(keys, index.metric)
    true_QK, true_ids_QK = _without(own_Q, *exact.search(queries_QD, k + 1, removed))
    if isinstance(index, ExactIndex):
        found_QK, ids_QK = true_QK, true_ids_QK
    else:
        found_QK, ids_QK = _without(own_Q, *index.search(queries_QD, k + 1, removed))
    checked_QK = rescore(queries_QD, ids_QK, keys, index.metric)
    hit_QK = ids_QK >= 0
    error = (found_QK - checked_QK).abs() / checked_QK.abs().clamp(min=1e-12)
    error = torch.where(found_QK == checked_QK, 0.0, error)[hit_QK]
    temperature, exact_temperature = default_temperature(found_QK), default_temperature(true_QK)
    return {
        "queries": size,
        "k": k,
        "recall": _recall(ids_QK, true_ids_QK),
        "distance_error": error.median().item() if error.numel() else 0.0,
        "entropy": _entropy(found_QK, ids_QK, values, temperature),
        "exact_entropy": _entropy(true_QK, true_ids_QK, values, exact_temperature),
        "temperature": temperature,
        "exact_temperature": exact_temperature,
    }


def _without(own_Q: Tensor, similarity_QK: Tensor, ids_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Drop each query's own id; its last hit where it did not find itself."""
    drop_QK = ids_QK == own_Q[:, None]
    drop_QK[:, -1] |= ~drop_QK.any(dim=1)
    shape = (len(own_Q), -1)
    return similarity_QK[~drop_QK].view(shape), ids_QK[~drop_QK].view(shape)


def _recall(ids_QK: Tensor, true_ids_QK: Tensor) -> float:
    """Share of the true ids that were found; ties may count as misses."""
    found = sum(
        int(torch.isin(true_K, ids_K).sum())
        for ids_K, true_K in zip(ids_QK, true_ids_QK, strict=True)
    )
    return found / true_ids_QK.numel()


def _entropy(similarity_QK: Tensor, ids_QK: Tensor, values: Tensor, temperature: float) -> float:
    """Mean entropy in nats of the kNN distributions; queries without a hit do not count."""
    tokens, tokens_QK = torch.unique(values[ids_QK.clamp(min=0)], return_inverse=True)
    rows = []
    for similarity_K, tokens_K in zip(similarity_QK, tokens_QK, strict=True):
        log_probs = knn_log_probs(similarity_K[None], tokens_K[None], temperature, len(tokens))
        log_probs = log_probs[log_probs.isfinite()]
        if log_probs.numel():
            rows.append(-(log_probs.exp() * log_probs).sum())
    return torch.stack(rows).mean().item() if rows else 0.0
