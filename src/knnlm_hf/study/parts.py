"""Parts of a datastore: a uniform sample of its entries, without copying a key.

A datastore is cut once, at random, into disjoint parts at the sizes of the paper's figure 2. The
entries up to any of those sizes are a union of parts, and its k nearest neighbours are the k best
of the parts' own: each part is indexed and searched once, whatever number of sizes is asked for.

Shape suffixes: N entry, Q query, K neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.types import KeyRows

SIZES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the datastore, as in the paper's figure 2."""
_QUERIES = 4096  # merged at a time
_COPIED_BYTES = 1 << 29


def cut(entries: int, seed: int) -> list[Tensor]:
    """Cut entries 0 … N−1 into as many disjoint parts as there are `SIZES`.

    Returns:
        for each size the entries that it has beyond the size before, in ascending order; parts
        1 … i are a uniform sample of round(SIZES[i] · N) entries without replacement.
    """
    order_N = np.random.default_rng(seed).permutation(entries)
    ends = [round(size * entries) for size in SIZES]
    return [
        torch.from_numpy(np.sort(order_N[start:end]))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


class ChosenRows:
    """Some rows of a store's keys; a `KeyRows`.

    They are read where they lie, or copied into memory once where they are few: searches then read
    them in random order.

    Args:
        keys: all keys.
        ids_N: the rows that are here, in their new order.
    """

    def __init__(self, keys: KeyRows, ids_N: Tensor) -> None:
        self.keys, self.ids_N = keys, ids_N

    @property
    def dim(self) -> int:
        """D."""
        return self.keys.dim

    def __len__(self) -> int:
        return len(self.ids_N)

    def __getitem__(self, ids: Any) -> Tensor:
        copy_ND = self._copy
        rows: Tensor = self.keys[self.ids_N[ids]] if copy_ND is None else copy_ND[ids]
        return rows

    @cached_property
    def _copy(self) -> Tensor | None:
        size = len(self) * self.dim * self.keys[:1].element_size()
        return self.keys[self.ids_N] if size <= _COPIED_BYTES else None

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order as (first number, (≤ size, D))."""
        for first in range(0, len(self), size):
            yield first, self[first : first + size]


def nearest_of(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The K best of two disjoint sets of neighbours, nearest first.

    Args:
        ours: similarity (Q, K) and whether each neighbour carries the target, (Q, K) bool.
        theirs: the same of the other set; K may differ: the larger is kept.
    """
    k = max(ours[0].shape[1], theirs[0].shape[1])
    parts = []
    for a, a_is, b, b_is in zip(*(torch.split(t, _QUERIES) for t in (*ours, *theirs)), strict=True):
        best_qK, where_qK = torch.cat([a, b], dim=1).topk(k, dim=1)
        parts.append((best_qK, torch.cat([a_is, b_is], dim=1).gather(1, where_qK)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
