"""Approximate search with FAISS; refinement from the stored keys.

similarity = −(FAISS's squared distance)   for l2: squared already, so no root
similarity = FAISS's inner product         for ip: a similarity already, so not negated
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from threading import Lock, local
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index.base import SearchIndex, missing
from knnlm_hf.index.exact import rescore
from knnlm_hf.index.faiss_library import has_torchs_threads, load_faiss, moves_of, parts_of
from knnlm_hf.index.faiss_one_query import OneQuery
from knnlm_hf.index.faiss_refine import refined
from knnlm_hf.parallel import over_blocks
from knnlm_hf.types import KeyRows, Metric

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed

_DERIVED = (
    "_ivf", "_moves", "_moved_index", "_hnsw", "_host", "_in_thread", "_set_threads", "_refined"
)  # fmt: skip
_log = logging.getLogger(__name__)
_widening = Lock()  # around a search with more lists than usual
_SORTED_ROWS = 64
_MANY_QUERIES = 64
"""So many are searched list by list."""
_FEW_LISTS = 4096
"""Among more, to find the nearest list once more would take what is gained by that."""
_MOST_SHARES = 4
"""Cores that share one query's lists: each finds k entries, of which those of all are taken."""


class FaissIndex(SearchIndex):
    """A FAISS index, trained and filled.

    Args:
        index: the `faiss.Index`; entry numbers are its ids.
        metric: `l2` or `ip`; default: read from the index.
        keys: the stored keys; where given, they refine: candidates are FAISS's, similarities and
            order are the true ones.

    Raises:
        SearchIndexError: the index has another metric or dimension.
    """

    def __init__(
        self, index: Any, metric: Metric | None = None, *, keys: KeyRows | None = None
    ) -> None:
        faiss = load_faiss()
        names = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}
        found = names.get(index.metric_type, f"FAISS metric {index.metric_type}")
        if found != (metric or found) or found not in names.values():
            raise SearchIndexError(
                f"the FAISS index measures {found}, expected {metric or 'l2 or ip'}: build it anew"
            )
        super().__init__(found, index.d)
        if keys is not None and keys.dim != self.dim:
            raise SearchIndexError(
                f"the FAISS index holds {self.dim}-d keys, the store {keys.dim}-d ones"
            )
        self.index = index
        self.keys = keys
        self.scores_are_exact = keys is not None
        self._look_into_index()

    def _look_into_index(self) -> None:
        faiss, index = load_faiss(), self.index
        self._ivf = faiss.try_extract_index_ivf(index)
        self._moves, self._moved_index = moves_of(index)
        parts = list(parts_of(index))
        self._hnsw = next((part.hnsw for part in parts if hasattr(part, "hnsw")), None)
        self._is_on_gpu = any(hasattr(part, "getDevice") for part in parts)
        # Few lists, whose centres are in the space of the queries that are searched with.
        has_lists = any(hasattr(part, "nlist") for part in parts) and not self._is_on_gpu
        behind = index if self.keys is not None else self._moved_index
        is_moved = any(hasattr(part, "chain") for part in parts_of(behind))
        is_scan = hasattr(self._moved_index, "bbs")
        few = has_lists and self._ivf.nlist <= _FEW_LISTS
        self._has_order = few and not is_moved and not (is_scan and self.keys is None)
        self._host: FaissIndex | None = None
        self._in_thread = local()
        self._set_threads = faiss.omp_set_num_threads
        # FAISS can be told which lists to search, what it finds in one does not depend on the
        # others, as it does where the residuals' tables are rounded, and torch wakes its threads.
        is_ivf = isinstance(self._moved_index, faiss.IndexIVF) and not self._is_on_gpu
        is_apart = is_ivf and not (is_scan and self._moved_index.by_residual)
        self._has_shares = is_apart and not self._moved_index.max_codes and has_torchs_threads()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is read from the index: in a copy it is to be read from the copy."""
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look_into_index()

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def nprobe(self) -> int | None:
        """Inverted lists visited per query, settable; None where the index has no lists."""
        return None if self._ivf is None else int(self._ivf.nprobe)

    @nprobe.setter
    def nprobe(self, lists: int) -> None:
        if self._ivf is None:
            raise SearchIndexError("this index has no inverted lists, so no nprobe to set")
        if int(lists) != lists or not 1 <= lists <= self._ivf.nlist:
            raise SearchIndexError(
                f"nprobe is {lists!r}, expected a whole number from 1 to {self._ivf.nlist}"
            )
        self._ivf.nprobe = int(lists)

    def _search(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        similarity_QK, ids_QK = self._search_unordered(queries_QD, k)
        if self._whole is None:
            order_QK = _nearest_first(similarity_QK)
            similarity_QK = similarity_QK.gather(1, order_QK)
            ids_QK = ids_QK.gather(1, order_QK)
        return similarity_QK, ids_QK

    def _search_unordered(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """In FAISS's order: where torch refines, that of its distances."""
        rows, entries = queries_QD.shape[0], len(self)
        found = min(k, entries)
        if found == 0:
            return missing(rows, k, queries_QD.device)
        whole = self._whole
        index = self._moved_index if whole is None else whole
        similarity_QK, ids_QK = self._read(self._call(index, queries_QD.cpu().numpy(), found))
        if whole is None:
            assert self.keys is not None
            similarity_QK = rescore(queries_QD, ids_QK, self.keys, self.metric)
        similarity_QK, ids_QK = similarity_QK.to(queries_QD.device), ids_QK.to(queries_QD.device)
        if found < k:
            similarity_QK = pad(similarity_QK, (0, k - found), value=-torch.inf)
            ids_QK = pad(ids_QK, (0, k - found), value=-1)
        return similarity_QK, ids_QK

    def _prepared(
        self, queries_QD: Tensor, k: int, removed: Removed | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """As of any index; where FAISS does all of it, with few operations around its call.

        That runs without the interpreter's lock. All else has to wait for it, again and again,
        while the model goes on.
        """
        index = self._at_once(queries_QD, k) if removed is None and len(queries_QD) else None
        if index is None:
            return super()._prepared(queries_QD, k, removed)
        checked_QD = self._checked(queries_QD).numpy()
        return lambda: self._read(self._call(index, checked_QD, k))

    def search_one(self, query_1D: Tensor, k: int) -> tuple[Any, Any] | None:
        """As of any index; where FAISS does all of it."""
        index = self._at_once(query_1D, k)
        if index is None:
            return None
        similarity_1K, ids_1K = self._similar(self._call(index, self._checked(query_1D).numpy(), k))
        return similarity_1K[0], ids_1K[0]

    def _at_once(self, queries_QD: Tensor, k: int) -> Any | None:
        """The `faiss.Index` whose one call is all there is to do; None where there is more."""
        has_own_ways = type(self) is not FaissIndex
        if has_own_ways or queries_QD.device.type != "cpu" or k > len(self):
            return None
        return self._whole

    @property
    def _whole(self) -> Any | None:
        """The `faiss.Index` that does all of it; None where torch has to refine."""
        if self.keys is None:
            return self._moved_index
        whole = self._refined
        return whole if whole is not None and whole.ntotal == len(self) else None

    @property
    def takes_all_cores(self) -> bool:
        """Whether several cores share the inverted lists of a single query.

        Where FAISS has threads of its own, one query is not worth waking them: they then spin while
        the model wants the cores. Those of torch do so anyway.
        """
        return self.keys is None and self._shares(torch.get_num_threads()) > 1

    def _shares(self, threads: int) -> int:
        """Among how many cores the lists of a query are divided equally."""
        if not self._has_shares:
            return 1
        most = min(threads, _MOST_SHARES)
        return next(n for n in range(most, 0, -1) if self._lists_visited % n == 0)

    @property
    def _lists_visited(self) -> int:
        """FAISS's own search looks for no more lists than there are, whatever its nprobe is."""
        return min(int(self._ivf.nprobe), int(self._ivf.nlist))

    def _call(self, index: Any, queries_QD: Any, k: int) -> tuple[Any, Any]:
        """FAISS's distances and ids, (Q, k) arrays."""
        if self._hnsw is not None and self._hnsw.efSearch < k:
            self._hnsw.efSearch = k  # subtle: FAISS stops early at efSearch, whatever k is
        # The setting is of this thread, and where both use one OpenMP, torch's as well.
        threads, rows = torch.get_num_threads(), len(queries_QD)
        self._set_threads(min(threads, rows))
        try:
            if index is self._moved_index:
                if rows == 1 and (shares := self._shares(threads)) > 1:
                    return self._of_one_query(queries_QD, k, shares)
                for move in self._moves:
                    queries_QD = move.apply(queries_QD)
            return self._in_order(index, queries_QD, k)
        finally:
            self._set_threads(threads)

    def _of_one_query(self, query_1D: Any, k: int, shares: int) -> tuple[Any, Any]:
        size = k, shares, self._lists_visited
        one: OneQuery | None = getattr(self._in_thread, "one", None)
        if one is None or one.size != size:
            one = self._in_thread.one = OneQuery(self._moves, self._ivf, *size)
        distance_K, ids_K = one.search(query_1D[0])
        return distance_K[None], ids_K[None]

    def _in_order(self, index: Any, queries_QD: Any, k: int) -> tuple[Any, Any]:
        if not self._has_order or len(queries_QD) < _MANY_QUERIES:
            found: tuple[Any, Any] = index.search(queries_QD, k)
            return found
        order_Q = self._list_by_list(queries_QD)
        distance_QK, ids_QK = index.search(queries_QD[order_Q], k)
        place_Q = order_Q.argsort()
        return distance_QK[place_Q], ids_QK[place_Q]

    def _list_by_list(self, queries_QD: Any) -> Any:
        """An order in which queries of one inverted list follow each other.

        They share candidates, which then are in the core's own cache: a tenth of the time. Not of a
        fast scan's, which are too small for that, and to find the order takes a tenth.
        """
        return self._ivf.quantizer.search(queries_QD, 1)[1][:, 0].argsort(kind="stable")

    def _read(self, found: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        similarity_QK, ids_QK = self._similar(found)
        return torch.from_numpy(similarity_QK), torch.from_numpy(ids_QK)

    def _similar(self, found: tuple[Any, Any]) -> tuple[Any, Any]:
        """Similarities and ids of distances and ids, which are overwritten."""
        similarity_QK, ids_QK = found
        if self.metric == "l2":
            np.negative(similarity_QK, out=similarity_QK)
            if similarity_QK[:, 0].max() > 0:  # a quantiser may say so; the nearest stand first
                np.minimum(similarity_QK, 0, out=similarity_QK)
        if ids_QK.view(np.uint64).max() >= len(self):  # at one look, a missing hit's −1 too
            similarity_QK[ids_QK < 0] = -np.inf
            if (most := int(ids_QK.max())) >= len(self):
                raise SearchIndexError(
                    f"the FAISS index names entry {most}, it holds {len(self)}: it is "
                    "damaged, or its ids are not the entries' numbers: build it anew"
                )
        return similarity_QK, ids_QK

    @cached_property
    def _refined(self) -> Any | None:
        if self.keys is None or self._is_on_gpu:
            return None
        return refined(self.index, self.keys)

    def _search_live(self, queries_QD: Tensor, k: int, removed: Removed) -> tuple[Tensor, Tensor]:
        """As any index, but with more lists where those visited hold too few live entries."""
        if self._is_on_gpu:  # where faiss finds 2,048 at most
            return self._on_the_host()._search_live(queries_QD, k, removed)
        similarity_QK, ids_QK = super()._search_live(queries_QD, k, removed)
        wanted = min(k, len(self) - removed.entries)
        if self._ivf is None or wanted == 0:
            return similarity_QK, ids_QK
        with _widening:
            usual = self._ivf.nprobe
            try:
                while self._ivf.nprobe < self._ivf.nlist:
                    short_Q = ids_QK[:, wanted - 1] < 0
                    if not bool(short_Q.any()):
                        break
                    self._ivf.nprobe = min(2 * self._ivf.nprobe, self._ivf.nlist)
                    more = super()._search_live(queries_QD[short_Q], k, removed)
                    similarity_QK[short_Q], ids_QK[short_Q] = more
            finally:
                self._ivf.nprobe = usual
        return similarity_QK, ids_QK

    def _on_the_host(self) -> FaissIndex:
        """The same index on the CPU, copied there once."""
        if self._host is None:
            _log.warning(
                "documents are removed from the store, so this index is searched on the CPU: build "
                "one over what store.compact(path) writes"
            )
            on_host = load_faiss().index_gpu_to_cpu(self.index)
            self._host = FaissIndex(on_host, self.metric, keys=self.keys)
        return self._host


def _nearest_first(similarity_QK: Tensor) -> Tensor:
    """The order of each row; on the CPU by numpy, whose vectorised sort is thrice torch's."""
    if similarity_QK.device.type != "cpu":
        return similarity_QK.argsort(dim=1, descending=True)
    order_QK = np.empty(similarity_QK.shape, dtype=np.int64)

    def work(part: slice) -> None:
        order_QK[part] = np.argsort(-similarity_QK[part].numpy(), axis=1)

    over_blocks(work, len(order_QK), _SORTED_ROWS)
    return torch.from_numpy(order_QK)
