"""FAISS itself: imported when it is first needed, taken apart, and its complaints."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch

from knnlm_hf.errors import SearchIndexError


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


def parts_of(index: Any) -> Iterator[Any]:
    """The index and those below its transforms and refinement, outermost first."""
    index = load_faiss().downcast_index(index)
    yield index
    for below in ("index", "base_index"):
        if hasattr(index, below):
            yield from parts_of(getattr(index, below))


def moves_of(index: Any) -> tuple[list[Any], Any]:
    """The transforms in front of an index, first one first, and the index behind them."""
    faiss = load_faiss()
    moves: list[Any] = []
    while hasattr(index := faiss.downcast_index(index), "chain"):
        chain = index.chain
        moves += [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
        index = index.index
    return moves, index


@functools.cache
def has_torchs_threads() -> bool:
    """Whether FAISS and torch use one OpenMP, as their Linux wheels do, and so the same threads."""
    faiss, before, own = load_faiss(), torch.get_num_threads(), load_faiss().omp_get_max_threads()
    faiss.omp_set_num_threads(before + 1)
    is_torchs_too = torch.get_num_threads() == before + 1
    faiss.omp_set_num_threads(own)
    return is_torchs_too


def version() -> str:
    """Version of the installed faiss."""
    return str(load_faiss().__version__)


def reason(error: BaseException) -> str:
    """What FAISS complains of, in one line, without its source locations."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^Error in .*? at \S+?:\d+: (Error: )?", "", text)[:200]
