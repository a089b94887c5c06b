"""Make and fill FAISS indexes, by any factory string.

A spec is a FAISS factory string, plus one last component of our own, `Refine(keys)`: FAISS proposes
the k candidates, the stored keys give their similarities and order. It needs no second copy.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index.faiss_library import load_faiss, parts_of, reason
from knnlm_hf.progress import track
from knnlm_hf.types import KeyRows, Metric

REFINE_KEYS = "Refine(keys)"
_ADD_BLOCK = 1 << 16
_TRAIN_PER_LIST = 64
_TRAIN_LEAST = 1 << 16
_TRAIN_BYTES = 2 << 30
_LISTS_VISITED = 8, 16
_MIN_ENTRIES_VISITED = 10_000


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
    for part in parts_of(index):
        # To sort a product quantiser's centroids for a Hamming filter, which no search here uses,
        # takes several times as long as finding them, and changes no distance.
        for one in (part, getattr(part, "storage", None), getattr(part, "refine_index", None)):
            if one is not None and hasattr(faiss.downcast_index(one), "do_polysemous_training"):
                faiss.downcast_index(one).do_polysemous_training = False
    try:
        if not index.is_trained:
            index.train(_training_sample(keys, lists, seed))
    except (RuntimeError, AssertionError) as error:
        raise _cannot_build(spec, keys, error) from error
    add(index, keys, spec, progress=progress)


def add(index: Any, keys: KeyRows, spec: str, *, progress: bool) -> None:
    """Add the keys that a trained FAISS index does not hold yet, block by block.

    Raises:
        SearchIndexError: FAISS refuses.
    """
    first = int(index.ntotal)
    blocks = track(
        range(first, len(keys), _ADD_BLOCK),
        "indexing",
        lambda start: min(_ADD_BLOCK, len(keys) - start),
        total=len(keys) - first,
        unit="entries",
        show=progress,
    )
    try:
        for start in blocks:
            index.add(keys[start : start + _ADD_BLOCK].float().numpy())
    except (RuntimeError, AssertionError) as error:
        raise _cannot_build(spec, keys, error) from error


def _cannot_build(spec: str, keys: KeyRows, error: BaseException) -> SearchIndexError:
    return SearchIndexError(
        f"FAISS cannot build index {spec!r} on {len(keys)} {keys.dim}-d entries: {reason(error)}; "
        "use 'auto' or 'exact'"
    )


def default_nprobe(lists: int, entries: int) -> int:
    """Lists to visit: √lists / 4, from 8 to 16, and as many as hold 10,000 entries.

    So k=1024 has a choice. A multiple of 4, so that several cores can share those of a query.
    """
    least, most = _LISTS_VISITED
    enough = -(-_MIN_ENTRIES_VISITED * lists // max(entries, 1))
    visited = max(least, min(most, math.ceil(math.sqrt(lists) / 4)), enough)
    return min(lists, -(-visited // 4) * 4)


def _training_sample(keys: KeyRows, lists: int, seed: int) -> np.ndarray[Any, Any]:
    """A uniform sample without replacement, float32: 64 keys per list, at most 2 GiB."""
    wanted = max(_TRAIN_PER_LIST * lists, _TRAIN_LEAST)
    affordable = max(_TRAIN_BYTES // (4 * keys.dim), 39 * lists)
    size = min(len(keys), wanted, affordable)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(len(keys), generator=generator)[:size].sort().values
    return keys[ids].float().numpy()
