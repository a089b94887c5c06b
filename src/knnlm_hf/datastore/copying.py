"""Rows of finished stores on their way into another: samples, compaction, appends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.folder import TOKENIZER
from knnlm_hf.datastore.reader import DatastoreReader
from knnlm_hf.datastore.writer import ShardText, StoreWriter
from knnlm_hf.errors import DatastoreError

ROWS = 1 << 15
"""Rows to copy at once."""


def copy_rows(
    writer: StoreWriter,
    values_n: npt.NDArray[np.int32],
    starts_m: npt.NDArray[np.int64],
    blocks: Iterable[Tensor],
    corpus: str,
) -> None:
    """Write n rows after the shards that the writer's manifest has, all of them full.

    Args:
        writer: to be finished by the caller.
        values_n: the rows' tokens.
        starts_m: entry numbers at which documents begin, ascending; of those not written yet.
        blocks: the rows' keys, in order.
        corpus: noted as the hash of the corpus.
    """
    size, written = writer.manifest.shard_size, writer.manifest.entries
    last = (written + len(values_n) - 1) // size
    shard_m = np.minimum(starts_m // size, last)
    for i in range(written // size, last + 1):
        first = i * size - written
        writer.put(ShardText(values_n[first : first + size], starts_m[shard_m == i], corpus))
    for block_nD in blocks:
        writer.append(block_nD)


def new_store(store: DatastoreReader, path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a store drawn from `store`; `path` appears whole or not at all.

    Raises:
        DatastoreError: `path` exists, or cannot be written.
    """
    if path.exists():
        raise DatastoreError(f"{path}: already exists: delete it or choose another folder")

    def fill_all(folder: Path) -> None:
        if (store.path / TOKENIZER).is_dir():
            shutil.copytree(store.path / TOKENIZER, folder / TOKENIZER)
        fill(folder)

    with atomic.explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(atomic.temporary(path), ignore_errors=True)
        atomic.write_folder(path, fill_all)
