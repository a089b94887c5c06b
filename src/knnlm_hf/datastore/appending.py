"""A finished store goes on with new documents.

The new documents become a store of their own first, in a folder inside: killed, that resumes as any
build does. Then its rows are written after the old ones, under new names, and the manifest, which
alone makes them part of the store, is replaced last. Readers have the old state or the new one.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.copying import ROWS, copy_rows
from knnlm_hf.datastore.manifest import Appended, Manifest
from knnlm_hf.datastore.reader import DatastoreReader
from knnlm_hf.datastore.writer import StoreWriter

STAGING = ".append"
"""Where, inside the store's folder, the store of the new documents is built."""


def settings(manifest: Manifest) -> Manifest:
    """The settings of a build of new documents for a store, but for the model."""
    return replace(
        manifest, dim=0, shards=(), documents=0, complete=False, subsample=None, removed=None,
        appended=(),
    )  # fmt: skip


def note(staged: DatastoreReader) -> Appended:
    """What the manifest will remember of this append."""
    return Appended(staged.documents, staged.manifest.shards[-1].corpus)


def merge(store: DatastoreReader, staged: DatastoreReader) -> Manifest:
    """Write the staged rows after the store's own; return the manifest that names them, unsaved.

    A last shard that is not full, or that documents without entries end, is written anew together
    with what follows; all others stay as they are.
    """
    manifest, entries = store.manifest, len(store)
    kept = manifest.shards
    ends_empty = int(store.document_starts[-1]) == entries
    if kept[-1].rows < manifest.shard_size or ends_empty:
        kept = kept[:-1]
    first = sum(shard.rows for shard in kept)
    known = sum(manifest.document_count(shard) for shard in kept)
    values_n = np.concatenate([store.values[first:].numpy(), staged.values.numpy()])
    starts_m = np.concatenate(
        [store.document_starts[known:].numpy(), staged.document_starts.numpy() + entries]
    )
    blocks = chain(
        (store.keys[i : i + ROWS] for i in range(first, entries, ROWS)),
        (staged.keys[i : i + ROWS] for i in range(0, len(staged), ROWS)),
    )
    added = note(staged)
    corpus = hashlib.sha256(f"{manifest.shards[-1].corpus}\n{added.corpus}".encode()).hexdigest()
    base = replace(manifest, shards=kept, complete=False)
    suffix = f"-{len(manifest.appended) + 1}"
    with closing(StoreWriter(store.path, base, suffix=suffix, publish=False)) as writer:
        copy_rows(writer, values_n, starts_m, blocks, corpus)
        grown = writer.finish(store.documents + staged.documents)
    return replace(grown, appended=(*manifest.appended, added))


def clear(folder: Path, manifest: Manifest) -> None:
    """Delete what an append leaves: the staging, and shards that the manifest does not name."""
    atomic.clear(folder)
    staging = folder / STAGING
    if staging.exists():
        os.replace(staging, atomic.temporary(staging))  # at once: half of it must not be resumed
    atomic.clear(folder)
    named = {shard.file for shard in manifest.shards}
    for file in folder.glob("shard-*.safetensors"):
        if file.name not in named:
            atomic.discard(file)
