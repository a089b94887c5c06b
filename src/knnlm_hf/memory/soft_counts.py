"""A datastore's entries gathered by their nearest centroid, and by token: what each centroid says.

    p_j(w) = Σ_{i: nearest(i) = j, value_i = w} a_i / Σ_{i: nearest(i) = j} a_i

with a_i = 1 (`counts`), 1 / d_i (`inverse`) or exp(−d_i² / t) (`softmax`), d_i being the distance
of key i to its centroid. Sums are kept as logs, so that a far entry's weight is not lost.

Shape suffixes: N entry, n entries of a block, J centroid, P pair of token and centroid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_hf.memory.entries import Entries
from knnlm_hf.memory.k_means import k_means, nearest
from knnlm_hf.progress import track

WEIGHTS = ("counts", "inverse", "softmax")
PRIORS = ("counts", "uniform")
_HELD = 1 << 22  # weights held before those of equal pairs are added up
_LEAST_DISTANCE = 1e-2  # of the typical one: what lies on its centroid has a finite weight


class Compressed(NamedTuple):
    """What a `CentroidMemory` is made of."""

    centroids: Tensor
    """(J, D) float32; each has an entry."""
    counts: Tensor
    """(J,) int64, entries of each."""
    token_starts: Tensor
    """(V + 1,) int64: token w has the pairs token_starts[w] … token_starts[w + 1] − 1."""
    pair_centroids: Tensor
    """(P,) int32, ascending for each token."""
    log_weights: Tensor
    """(P,) float32, log p_j(w): their exponentials sum to 1 for each centroid."""
    spread: float
    """Mean squared distance of a key to its centroid, in the last round of k-means."""


def compress(
    entries: Entries,
    clusters: int,
    *,
    weights: str = "counts",
    temperature: float | None = None,
    iterations: int = 10,
    per_cluster: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Compressed:
    """Find centroids of a store's entries, and what tokens each has.

    Held-out entries do not take part, but for those whose token no other entry has.

    Args:
        entries: the store's, with a part held out.
        clusters: centroids; those without an entry are dropped.
        weights: of an entry; `softmax` has t = `temperature`, or the mean squared distance.
        iterations, seed, device, progress: as for `k_means`.
        per_cluster: k-means sees at most so many entries for each cluster.
    """
    store = entries.store
    ids_N = _with_every_token(entries)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(ids_N), generator=generator)[: clusters * per_cluster]
    centroids_JD, spread = k_means(
        store.keys, ids_N[sample.sort().values], clusters,
        iterations=iterations, seed=seed, device=device, progress=progress,
    )  # fmt: skip
    pairs = _Pairs(len(centroids_JD))
    counts_J = torch.zeros(len(centroids_JD), dtype=torch.int64)
    blocks = track(
        nearest(store.keys, ids_N, centroids_JD), "counting tokens", lambda block: len(block[0]),
        total=len(ids_N), unit="entries", show=progress,
    )  # fmt: skip
    for ids_n, _, cluster_n, distance_n in blocks:
        log_n = _log_weights(distance_n.double().cpu(), weights, spread, temperature or spread)
        pairs.add(store.values[ids_n].long(), cluster_n.cpu(), log_n)
        counts_J += cluster_n.cpu().bincount(minlength=len(counts_J))
    tokens_P, centroids_P, log_P = pairs.sums()
    has_entry_J = counts_J > 0
    new_number_J = has_entry_J.cumsum(0) - 1
    centroids_P = new_number_J[centroids_P]
    log_P -= log_sums(log_P, centroids_P, int(has_entry_J.sum()))[centroids_P]
    return Compressed(
        centroids_JD[has_entry_J.to(centroids_JD.device)], counts_J[has_entry_J],
        torch.searchsorted(tokens_P, torch.arange(store.vocab_size + 1)),
        centroids_P.to(torch.int32), log_P.float(), spread,
    )  # fmt: skip


def _with_every_token(entries: Entries) -> Tensor:
    """Numbers of the entries that are not held out, and of those that alone have their token."""
    ids_N, held_n = entries.trained_ids, entries.held_out_ids
    has_token_V = torch.zeros(entries.store.vocab_size, dtype=torch.bool)
    has_token_V[entries.store.values[ids_N].long()] = True
    alone_n = held_n[~has_token_V[entries.store.values[held_n].long()]]
    return torch.cat([ids_N, alone_n]).sort().values


def _log_weights(squared_n: Tensor, weights: str, spread: float, temperature: float) -> Tensor:
    """log a of entries at these squared distances; all alike where nothing is spread."""
    if weights == "counts" or spread == 0:
        return torch.zeros_like(squared_n)
    if weights == "inverse":
        return -0.5 * squared_n.clamp(min=spread * _LEAST_DISTANCE**2).log()
    return -squared_n / temperature


class _Pairs:
    """A running log-sum of weights for each pair of token and centroid that occurs."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self.keys, self.logs = [torch.empty(0, dtype=torch.int64)], [torch.empty(0).double()]
        self.held = 0

    def add(self, tokens_n: Tensor, centroids_n: Tensor, log_n: Tensor) -> None:
        self.keys.append(tokens_n * self.clusters + centroids_n)
        self.logs.append(log_n)
        self.held += len(log_n)
        if self.held > _HELD:
            self._add_up()

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, centroids and log-sums (P,), by token and then by centroid."""
        self._add_up()
        return self.keys[0] // self.clusters, self.keys[0] % self.clusters, self.logs[0]

    def _add_up(self) -> None:
        keys_P, pair_n = torch.unique(torch.cat(self.keys), return_inverse=True)
        self.keys, self.logs = [keys_P], [log_sums(torch.cat(self.logs), pair_n, len(keys_P))]
        self.held = 0


def log_sums(log_n: Tensor, group_n: Tensor, groups: int) -> Tensor:
    """log Σ exp of each group (groups,); every group has a member."""
    peak = log_n.new_full((groups,), -torch.inf)
    peak = peak.scatter_reduce(0, group_n, log_n.detach(), "amax")
    total = torch.zeros_like(peak).index_add(0, group_n, (log_n - peak[group_n]).exp())
    return peak + total.log()


def is_table(token_starts: Tensor, pair_centroids: Tensor, clusters: int) -> bool:
    """Whether these, which may come from a stranger, are a table of tokens and centroids."""
    if token_starts.dtype != torch.int64 or pair_centroids.dtype != torch.int32:
        return False
    ends = token_starts[[0, -1]].tolist() if token_starts.numel() else []
    is_ordered = ends == [0, len(pair_centroids)] and bool((token_starts.diff() >= 0).all())
    return is_ordered and bool(((pair_centroids >= 0) & (pair_centroids < clusters)).all())
