"""Refinement by FAISS itself, from the stored keys where they lie.

One call without the interpreter's lock finds the candidates, compares and sorts them, each core
with queries of its own. Nothing is copied on the way: torch's way through the keys (`rescore`)
writes every candidate down first, twice. Measured on two cores for 1,024 queries and k=1024: 30 %
less time for a whole search with D=256, 60 % less with D=1024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnlm_hf.index.faiss_library import load_faiss, parts_of
from knnlm_hf.types import KeyRows


def refined(index: Any, keys: KeyRows) -> Any | None:
    """`index` with `keys` behind it, as one `faiss.Index` on the CPU; None where that cannot be.

    FAISS reads the keys by the numbers that the index gives, wherever these point to. So they are
    looked through here; who adds to `index` later must ask again.

    Args:
        index: a FAISS index of these keys, on the CPU.
        keys: the stored keys, of which nothing is copied. What is returned reads their memory: they
            must live as long.
    """
    rows_ND = _in_one_piece(keys)
    if rows_ND is None or index.ntotal != len(keys) or not _names_entries(index):
        return None
    stored = _stored(rows_ND, index.metric_type)
    return None if stored is None else load_faiss().IndexRefine(index, stored)


def _in_one_piece(keys: KeyRows) -> Tensor | None:
    rows_ND = next(iter(keys.blocks(max(1, len(keys)))), (0, None))[1]
    if rows_ND is None or rows_ND.shape[0] != len(keys) or rows_ND.device.type != "cpu":
        return None
    return rows_ND if rows_ND.is_contiguous() else None


def _names_entries(index: Any) -> bool:
    """Whether all ids of an index are below its number of entries."""
    faiss = load_faiss()
    if any(hasattr(part, "id_map") for part in parts_of(index)):
        return False
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return True  # numbered in the order of their coming
    lists = ivf.invlists
    for number in range(ivf.nlist):
        size = lists.list_size(number)
        if size and faiss.rev_swig_ptr(lists.get_ids(number), size).max() >= index.ntotal:
            return False
    return True


def _stored(rows_ND: Tensor, metric_type: int) -> Any | None:
    """A flat index over rows in place; None where FAISS has none for their dtype."""
    faiss = load_faiss()
    entries, dim = rows_ND.shape
    if rows_ND.dtype == torch.float32:
        stored = faiss.IndexFlat(dim, metric_type)
    elif rows_ND.dtype == torch.float16:
        kind = faiss.ScalarQuantizer.QT_fp16
        stored = faiss.IndexScalarQuantizer(dim, kind, metric_type)
    else:  # subtle: of bfloat16 keys FAISS rounds the query too, on a CPU with AMX
        return None
    address = faiss.cast_integer_to_void_ptr(rows_ND.data_ptr())
    stored.codes = stored.codes.create_view(address, rows_ND.nbytes, stored.codes.owner)
    stored.ntotal = entries
    return stored
