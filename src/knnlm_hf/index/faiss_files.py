"""FAISS indexes from and to files and devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index.faiss_library import load_faiss, reason

_LEAST_LIMIT = 1 << 20


def read(path: Path, *, mapped: bool = True) -> Any:
    """Read a FAISS index, memory-mapped where its type allows that and it is not to be changed.

    FAISS allocates no more than the file could fill, and follows no path that the file names.

    Raises:
        SearchIndexError: FAISS cannot read the file, or it keeps its lists in another one.
    """
    faiss = load_faiss()
    flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
    index = None
    with _bounded(max(_LEAST_LIMIT, 2 * path.stat().st_size)):
        if mapped:
            with suppress(RuntimeError):  # not every type can be mapped
                index = faiss.read_index(str(path), flags | faiss.IO_FLAG_MMAP_IFC)
        if index is None:
            try:
                index = faiss.read_index(str(path), flags)
            except (RuntimeError, MemoryError) as error:
                raise SearchIndexError(f"{path}: FAISS cannot read it: {reason(error)}") from error
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and isinstance(
        faiss.downcast_InvertedLists(ivf.invlists), faiss.OnDiskInvertedLists
    ):
        raise SearchIndexError(f"{path}: keeps its lists in another file, which is not read")
    return index


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


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Have FAISS refuse a file that claims more than `most` bytes, or parts, of anything."""
    faiss = load_faiss()
    names = ("deserialization_vector_byte_limit", "deserialization_loop_limit")
    known = [name for name in names if hasattr(faiss, f"set_{name}")]  # since FAISS 1.14
    usual = {name: getattr(faiss, f"get_{name}")() for name in known}
    try:
        for name in known:
            getattr(faiss, f"set_{name}")(most)
        yield
    finally:
        for name, limit in usual.items():
            getattr(faiss, f"set_{name}")(limit)
