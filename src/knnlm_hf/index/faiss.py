"""Approximate search with FAISS, by any factory string; refinement from the stored keys.

    similarity = −(FAISS's squared distance)   for l2: squared already, so no root
    similarity = FAISS's inner product         for ip: a similarity already, so not negated

A spec is a FAISS factory string, plus one last component of our own, `Refine(keys)`: FAISS proposes
the k candidates, the stored keys give their similarities and order. It needs no second copy.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index.base import SearchIndex, missing
from knnlm_hf.index.exact import rescore
from knnlm_hf.parallel import over_blocks
from knnlm_hf.progress import track
from knnlm_hf.types import KeyRows, Metric

REFINE_KEYS = "Refine(keys)"
_SORTED_ROWS = 64
_ADD_BLOCK = 1 << 16
_TRAIN_PER_LIST = 256
_TRAIN_LEAST = 1 << 16
_TRAIN_BYTES = 2 << 30
_MIN_LISTS_VISITED = 8
_MIN_ENTRIES_VISITED = 20_000


def load_faiss() -> Any:
    """Import faiss, or say how to get it.

    Raises:
        SearchIndexError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise SearchIndexError(
            'this index needs faiss, which is not installed: pip install "knnlm-hf[cpu]" (or '
            '"knnlm-hf[gpu]"), or search exactly with index="exact"'
        ) from error
    return faiss


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
        self._ivf = faiss.try_extract_index_ivf(index)
        self._hnsw = _hnsw_of(index)
        self._set_threads = faiss.omp_set_num_threads

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
        found = min(k, len(self))
        if found == 0:
            return missing(queries_QD.shape[0], k, queries_QD.device)
        # FAISS has its own OpenMP: the setting is per thread, so it is made at every search.
        # One query is not worth waking threads, which then spin while the model wants the cores.
        self._set_threads(min(torch.get_num_threads(), queries_QD.shape[0]))
        if self._hnsw is not None and self._hnsw.efSearch < found:
            self._hnsw.efSearch = found  # subtle: FAISS stops early at efSearch, whatever k is
        distance_QK, ids_QK = map(
            torch.from_numpy, self.index.search(queries_QD.cpu().numpy(), found)
        )
        if self.keys is None:
            similarity_QK = distance_QK if self.metric == "ip" else distance_QK.neg_().clamp_(max=0)
            similarity_QK = similarity_QK.masked_fill_(ids_QK < 0, -torch.inf)
        else:
            similarity_QK = rescore(queries_QD, ids_QK, self.keys, self.metric)
            order_QK = _nearest_first(similarity_QK)
            similarity_QK = similarity_QK.gather(1, order_QK)
            ids_QK = ids_QK.to(order_QK.device).gather(1, order_QK)
        similarity_QK, ids_QK = similarity_QK.to(queries_QD.device), ids_QK.to(queries_QD.device)
        if found < k:
            similarity_QK = pad(similarity_QK, (0, k - found), value=-torch.inf)
            ids_QK = pad(ids_QK, (0, k - found), value=-1)
        return similarity_QK, ids_QK


def _nearest_first(similarity_QK: Tensor) -> Tensor:
    """The order of each row; on the CPU by numpy, whose vectorised sort is thrice torch's."""
    if similarity_QK.device.type != "cpu":
        return similarity_QK.argsort(dim=1, descending=True)
    order_QK = np.empty(similarity_QK.shape, dtype=np.int64)

    def work(part: slice) -> None:
        order_QK[part] = np.argsort(-similarity_QK[part].numpy(), axis=1)

    over_blocks(work, len(order_QK), _SORTED_ROWS)
    return torch.from_numpy(order_QK)


def _hnsw_of(index: Any) -> Any:
    """The HNSW graph that is searched first, below transforms and refinement; None without one."""
    index = load_faiss().downcast_index(index)
    for below in ("index", "base_index"):
        if hasattr(index, below):
            return _hnsw_of(getattr(index, below))
    return getattr(index, "hnsw", None)


def split_spec(spec: str) -> tuple[str, bool]:
    """The FAISS factory string of a spec, and whether the stored keys refine."""
    factory, comma, last = spec.rpartition(",")
    refines = bool(comma) and last.strip() == REFINE_KEYS
    return (factory if refines else spec), refines


def empty_index(spec: str, dim: int, metric: Metric) -> Any:
    """An untrained FAISS index, by the spec's factory string.

    Raises:
        SearchIndexError: FAISS does not know the string, or not for this dimension or metric; or
            its distances would be no similarities.
    """
    faiss = load_faiss()
    factory, refines = split_spec(spec)
    if not refines and re.search(r"LSH|L2norm", factory):
        raise SearchIndexError(
            f"index {spec!r} does not give −‖q−k‖² or q·k: add ',{REFINE_KEYS}' to it"
        )
    if metric == "ip" and re.search(r"PCA|ITQ", factory):
        raise SearchIndexError(
            f"index {spec!r} moves the keys' origin, which inner products do not survive: use OPQ "
            "or RR in place of PCA and ITQ, or metric l2"
        )
    try:
        measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(dim, factory, measure)
    except (RuntimeError, AssertionError) as error:
        raise SearchIndexError(
            f"FAISS cannot make index {spec!r} for {dim}-d keys and {metric}: {reason(error)}; "
            "expected 'auto', 'exact' or a FAISS factory string (product quantisers must divide "
            "the dimension: 'Pad' in front makes it a multiple)"
        ) from error
    if index.metric_type != measure:
        raise SearchIndexError(f"FAISS makes index {spec!r} for another metric than {metric}")
    return index


def fill(
    index: Any, keys: KeyRows, spec: str, *, seed: int, nprobe: int | None, progress: bool
) -> None:
    """Train a FAISS index on a uniform sample of the keys and add them all, block by block.

    Raises:
        SearchIndexError: too few entries to train it, or FAISS refuses.
    """
    faiss = load_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    ivf = faiss.try_extract_index_ivf(index)
    lists = 0 if ivf is None else int(ivf.nlist)
    if lists > len(keys):
        raise SearchIndexError(
            f"index {spec!r} has {lists} lists, the store only {len(keys)} entries: "
            f"use at most {max(1, len(keys) // 39)} lists, 'auto' or 'exact'"
        )
    if ivf is not None:
        ivf.cp.seed = seed + 1234
        ivf.nprobe = min(lists, nprobe or default_nprobe(lists, len(keys)))
    try:
        if not index.is_trained:
            index.train(_training_sample(keys, lists, seed))
        blocks = track(
            keys.blocks(_ADD_BLOCK),
            "indexing",
            _rows,
            total=len(keys),
            unit="entries",
            show=progress,
        )
        for _, block in blocks:
            index.add(block.float().numpy())
    except (RuntimeError, AssertionError) as error:
        raise SearchIndexError(
            f"FAISS cannot build index {spec!r} on {len(keys)} {keys.dim}-d entries: "
            f"{reason(error)}; use 'auto' or 'exact'"
        ) from error


def default_nprobe(lists: int, entries: int) -> int:
    """Lists to visit: 8, or as many as hold 20,000 entries, so that k=1024 has a choice."""
    enough = -(-_MIN_ENTRIES_VISITED * lists // max(entries, 1))
    return min(lists, max(_MIN_LISTS_VISITED, enough))


def read(path: Path) -> Any:
    """Read a FAISS index, memory-mapped where its type allows that.

    Raises:
        SearchIndexError: FAISS cannot read the file.
    """
    faiss = load_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        pass  # not every type can be mapped
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise SearchIndexError(f"{path}: FAISS cannot read it: {reason(error)}") from error


def write(index: Any, path: Path) -> None:
    """Write a FAISS index to a file. Raises `OSError` where that fails."""
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(reason(error)) from error


def to_gpu(index: Any) -> Any:
    """The index on the GPU, where faiss has GPUs and the type exists there; else the index."""
    faiss = load_faiss()
    if not torch.cuda.is_available() or getattr(faiss, "get_num_gpus", int)() == 0:
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:
        warnings.warn(f"this index type stays on the CPU: {reason(error)}", stacklevel=2)
        return index


def version() -> str:
    """Version of the installed faiss."""
    return str(load_faiss().__version__)


def reason(error: BaseException) -> str:
    """What FAISS complains of, in one line, without its source locations."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^Error in .*? at \S+?:\d+: (Error: )?", "", text)[:200]


def _training_sample(keys: KeyRows, lists: int, seed: int) -> np.ndarray[Any, Any]:
    """A uniform sample without replacement, float32: 256 keys per list, at most 2 GiB."""
    wanted = max(_TRAIN_PER_LIST * lists, _TRAIN_LEAST)
    affordable = max(_TRAIN_BYTES // (4 * keys.dim), 39 * lists)
    size = min(len(keys), wanted, affordable)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(len(keys), generator=generator)[:size].sort().values
    return keys[ids].float().numpy()


def _rows(block: tuple[int, Tensor]) -> int:
    return len(block[1])
