"""FAISS's search for one query, whose inverted lists several cores share.

While a text is generated one query comes at a time. FAISS gives it one core; here each core
searches some of its lists, as if they were those of a query of its own. And all arrays, and what
FAISS is told of them, are made once: to make them each time takes a third as long as to search.

Shape suffixes: D dimension, S share, P inverted list visited, K neighbour, n = S · K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from knnlm_hf.index.faiss_library import load_faiss


class OneQuery:
    """The search for one query after another, in one thread.

    Args:
        moves: the transforms in front of the index.
        ivf: the `faiss.IndexIVF` behind them.
        k: neighbours to find.
        shares: cores.
        lists: inverted lists to visit, a multiple of `shares`.
    """

    def __init__(self, moves: Sequence[Any], ivf: Any, k: int, shares: int, lists: int) -> None:
        faiss = load_faiss()
        self.size = k, shares, lists
        self._ivf = ivf
        self._is_l2 = ivf.metric_type == faiss.METRIC_L2
        self._settings = faiss.SearchParametersIVF(nprobe=lists // shares)
        self._set_threads: Callable[[int], None] = faiss.omp_set_num_threads
        self._queries_SD = np.empty((shares, ivf.d), dtype=np.float32)
        # The query before each move, and behind the last one: FAISS is told where they are.
        before = [np.empty(move.d_in, dtype=np.float32) for move in moves]
        self._steps = [*before, self._queries_SD[0]]
        self._moves = [
            (move.apply_noalloc, faiss.swig_ptr(before_D), faiss.swig_ptr(after_D))
            for move, before_D, after_D in zip(moves, before, self._steps[1:], strict=True)
        ]
        self._centre_distance_P = np.empty(lists, dtype=np.float32)
        self._lists_P = np.empty(lists, dtype=np.int64)
        self._distance_n = np.empty(shares * k, dtype=np.float32)
        self._ids_n = np.empty(shares * k, dtype=np.int64)
        arrays = (
            self._queries_SD,
            self._centre_distance_P,
            self._lists_P,
            self._distance_n,
            self._ids_n,
        )
        self._pointers = tuple(map(faiss.swig_ptr, arrays))

    def search(self, query_D: Any) -> tuple[Any, Any]:
        """Distances and ids of the k nearest entries, (K,) arrays of the caller's own."""
        k, shares, lists = self.size
        queries, centre_distance, visited, distance, ids = self._pointers
        self._steps[0][:] = query_D
        for apply, before, after in self._moves:
            apply(1, before, after)
        self._ivf.quantizer.search_c(1, queries, lists, centre_distance, visited)
        self._queries_SD[1:] = self._queries_SD[0]
        self._set_threads(shares)
        self._ivf.search_preassigned_c(
            shares, queries, k, visited, centre_distance, distance, ids, False, self._settings
        )
        order_n = self._distance_n if self._is_l2 else -self._distance_n
        if self._ids_n.min() < 0:
            # subtle: of one neighbour a fast scan that finds nothing says that it is very near.
            order_n = np.where(self._ids_n < 0, np.inf, order_n)
        nearest_K = order_n.argsort(kind="stable")[:k]  # of sorted runs: they are merged
        return self._distance_n.take(nearest_K), self._ids_n.take(nearest_K)
