"""One finished shard, checked and mapped; readable for as long as it is held, whatever happens to
its name on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_hf.datastore.manifest import DATA_START, DTYPES, Manifest, Shard
from knnlm_hf.datastore.writer import shard_header
from knnlm_hf.errors import DatastoreError
from knnlm_hf.untrusted import inside

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}
"""What numpy calls the dtypes of keys; it has no bfloat16, so the same bytes as integers."""


class MappedShard:
    """A shard's three tensors, mapped from the disk.

    Raises:
        DatastoreError: it is not there, or not of the size and header that the manifest implies.
    """

    def __init__(self, folder: Path, shard: Shard, manifest: Manifest) -> None:
        path = check_shard(folder, shard, manifest)
        # Copy-on-write: torch wants writable memory, and the file must never change.
        flat = np.memmap(path, np.uint8, "c", DATA_START).view(np.ndarray)
        values_at = shard.rows * manifest.row_bytes
        starts_at = values_at + shard.rows * 4
        kind = NUMPY[manifest.dtype]
        self.keys: Tensor = (
            torch.from_numpy(_part(flat, kind, 0, shard.rows * manifest.dim))
            .view(DTYPES[manifest.dtype])
            .view(shard.rows, manifest.dim)
        )
        """(rows, D), in stored dtype."""
        self.values: Tensor = torch.from_numpy(_part(flat, np.int32, values_at, shard.rows))
        """(rows,) int32."""
        starts = _part(flat, np.int64, starts_at, manifest.document_count(shard))
        self.document_starts: npt.NDArray[np.int64] = starts
        """First entry, in the store, of each document that begins here."""


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Check that every shard is there, of the size and header that the manifest implies."""
    for shard in manifest.shards:
        check_shard(folder, shard, manifest)


def check_shard(folder: Path, shard: Shard, manifest: Manifest) -> Path:
    """The path of a shard of the size and header that the manifest implies."""
    path = inside(folder, shard.file, DatastoreError)
    size = path.stat().st_size
    if size != shard.bytes:
        raise DatastoreError(
            f"{path}: the shard has {size:,} bytes, expected {shard.bytes:,}: it is truncated or "
            "not of this store"
        )
    header = shard_header(manifest, shard.rows, manifest.document_count(shard))
    with path.open("rb") as file:
        if file.read(DATA_START) != header:
            raise DatastoreError(f"{path}: the shard's header does not fit the manifest")
    return path


def _part(flat: npt.NDArray[np.uint8], kind: Any, at: int, count: int) -> npt.NDArray[Any]:
    """`count` numbers from byte `at` on: a view, where they are aligned."""
    size = np.dtype(kind).itemsize
    found: npt.NDArray[Any] = flat[at : at + count * size].view(kind)
    return found if at % size == 0 else found.copy()
