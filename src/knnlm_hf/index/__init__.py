"""Search among the stored keys: exactly in plain torch, or approximately with FAISS.

Importing this package does not import faiss.
"""

from knnlm_hf.index.auto import available_memory, choose
from knnlm_hf.index.base import IndexInfo, SearchIndex
from knnlm_hf.index.exact import ExactIndex, rescore
from knnlm_hf.index.faiss import FaissIndex
from knnlm_hf.index.files import build_index, open_index
from knnlm_hf.index.growth import take_in
from knnlm_hf.index.records import built_indexes
from knnlm_hf.index.selfcheck import self_check
from knnlm_hf.index.wrap import wrap_index

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "IndexInfo",
    "SearchIndex",
    "available_memory",
    "build_index",
    "built_indexes",
    "choose",
    "open_index",
    "rescore",
    "self_check",
    "take_in",
    "wrap_index",
]
