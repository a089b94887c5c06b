"""A uniform sample of a datastore's entries, as a datastore of its own."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.datastore.card import card
from knnlm_hf.datastore.copying import ROWS, copy_rows, new_store
from knnlm_hf.datastore.reader import DatastoreReader
from knnlm_hf.datastore.writer import StoreWriter
from knnlm_hf.errors import DatastoreError, SettingError


def subsample(store: DatastoreReader, fraction: float, path: Path, seed: int) -> None:
    """Write round(fraction · live) ≥ 1 live entries of `store`, in order, to the new store `path`.

    The folder appears whole or not at all.

    Raises:
        SettingError: not 0 < fraction ≤ 1.
        DatastoreError: `path` exists, or cannot be written; or every entry is removed.
    """
    if not 0 < fraction <= 1:
        raise SettingError(f"fraction is {fraction!r}, expected 0 < fraction <= 1")
    count = max(1, round(fraction * store.live))
    _check_live(store)
    chosen_n = np.random.default_rng(seed).choice(store.live, count, replace=False, shuffle=False)
    chosen_n.sort()
    how: dict[str, float | int] = {"fraction": fraction, "seed": seed}
    ids_n = store.nth_live(torch.from_numpy(chosen_n))
    new_store(store, path, lambda folder: _write(store, ids_n, folder, how))


def compact(store: DatastoreReader, path: Path) -> None:
    """Write the live entries of `store`, in order, to the new store `path`.

    Raises:
        DatastoreError: `path` exists, or cannot be written; or every entry is removed.
    """
    _check_live(store)
    ids_n = store.nth_live(torch.arange(store.live))
    new_store(store, path, lambda folder: _write(store, ids_n, folder, None))


def _check_live(store: DatastoreReader) -> None:
    if store.live == 0:
        raise DatastoreError(f"{store.path}: every entry is removed: nothing would be left")


def _write(
    store: DatastoreReader, ids_n: Tensor, folder: Path, sampled: dict[str, float | int] | None
) -> None:
    """Write these entries, ascending; documents keep their numbers, with or without entries."""
    origin = {"parent": store.digest, **(sampled or {})}
    manifest = replace(store.manifest, shards=(), documents=0, complete=False, removed=None)
    if sampled is not None:
        manifest = replace(manifest, subsample=origin, appended=())
    (folder / "README.md").write_text(card(manifest, len(ids_n), store.documents), "utf-8")
    corpus = hashlib.sha256(repr(sorted(origin.items())).encode()).hexdigest()
    # A document begins, in the copy, at the number of copied entries before it.
    starts_m = np.searchsorted(ids_n.numpy(), store.document_starts.numpy()).astype(np.int64)
    blocks = (store.keys[some_n] for some_n in torch.split(ids_n, ROWS))
    with closing(StoreWriter(folder, manifest)) as writer:
        copy_rows(writer, store.values[ids_n].numpy(), starts_m, blocks, corpus)
        writer.finish(store.documents)
