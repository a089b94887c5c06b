"""Everything in a store, read and compared with its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from knnlm_hf.datastore import removal
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.datastore.shards import MappedShard
from knnlm_hf.errors import DatastoreError
from knnlm_hf.progress import track
from knnlm_hf.types import is_finite

if TYPE_CHECKING:
    from knnlm_hf.datastore.reader import DatastoreReader

_CHECKED_ROWS = 1 << 14


def verify(store: DatastoreReader, progress: bool) -> None:
    """See `DatastoreReader.verify`."""
    manifest = store.manifest
    removal.load(store.path, manifest)
    last_start, first = 0, 0
    shards = track(
        manifest.shards,
        "verifying",
        lambda shard: shard.rows,
        total=len(store),
        unit="entries",
        show=progress,
    )
    for i, shard in enumerate(shards):
        path = store.path / shard.file
        mapped = MappedShard(store.path, shard, manifest)
        if file_sha256(path) != shard.sha256:
            raise DatastoreError(f"{path}: the file is damaged: its checksum is another one")
        values = mapped.values
        if not 0 <= int(values.min()) <= int(values.max()) < store.vocab_size:
            raise DatastoreError(f"{path}: a value is outside [0, {store.vocab_size})")
        is_last = i == len(manifest.shards) - 1
        starts = mapped.document_starts
        bounds = np.concatenate([[max(first, last_start)], starts, [first + shard.rows]])
        begins_late = i == 0 and (not len(starts) or starts[0] != 0)
        if begins_late or (np.diff(bounds) < 0).any():
            raise DatastoreError(f"{path}: the document table is out of order")
        if not is_last and len(starts) and starts[-1] == first + shard.rows:
            raise DatastoreError(f"{path}: the document table reaches into the next shard")
        last_start, first = int(bounds[-2]), first + shard.rows
        for block in torch.split(mapped.keys, _CHECKED_ROWS):
            if not is_finite(block):
                raise DatastoreError(f"{path}: a key is NaN or infinite")
