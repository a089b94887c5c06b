"""An index of the user's own as a `SearchIndex`."""

from __future__ import annotations

from typing import Any

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index.base import SearchIndex
from knnlm_hf.index.faiss import FaissIndex
from knnlm_hf.types import Metric


def wrap_index(index: Any, metric: Metric, *, entries: int, dim: int) -> SearchIndex:
    """Return `index`, a `SearchIndex` or a `faiss.Index`, after checking that it fits a store.

    Raises:
        SearchIndexError: of another metric, width or number of entries, or no index at all.
    """
    if not isinstance(index, SearchIndex):
        if not hasattr(index, "ntotal"):
            raise SearchIndexError(
                f"index is {type(index).__name__}, expected 'auto', 'exact', a factory string, "
                "a SearchIndex or a faiss.Index"
            )
        index = FaissIndex(index, metric)
    fitting: SearchIndex = index
    found, expected = (index.metric, index.dim, len(index)), (metric, dim, entries)
    if found != expected:
        raise SearchIndexError(
            "the index has metric {!r}, {} dimensions and {} entries, ".format(*found)
            + "the store needs {!r}, {} and {}: build it from this store's keys".format(*expected)
        )
    return fitting
