"""A uniform sample of a datastore's entries, as a datastore of its own."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.card import card
from knnlm_hf.datastore.reader import DatastoreReader
from knnlm_hf.datastore.writer import ShardText, StoreWriter
from knnlm_hf.errors import DatastoreError, SettingError

_ROWS = 1 << 15  # rows copied at once


def subsample(store: DatastoreReader, fraction: float, path: Path, seed: int) -> None:
    """Write round(fraction · N) ≥ 1 entries of `store`, in order, to the new store `path`.

    The folder appears whole or not at all.

    Raises:
        SettingError: not 0 < fraction ≤ 1.
        DatastoreError: `path` exists, or cannot be written.
    """
    if not 0 < fraction <= 1:
        raise SettingError(f"fraction is {fraction!r}, expected 0 < fraction <= 1")
    if path.exists():
        raise DatastoreError(f"{path}: already exists: delete it or choose another folder")
    count = max(1, round(fraction * len(store)))
    chosen_n = np.random.default_rng(seed).choice(len(store), count, replace=False, shuffle=False)
    chosen_n.sort()

    def fill(folder: Path) -> None:
        if (store.path / "tokenizer").is_dir():
            shutil.copytree(store.path / "tokenizer", folder / "tokenizer")
        _write(store, chosen_n, folder, {"fraction": fraction, "seed": seed})

    with atomic.explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(atomic.temporary(path), ignore_errors=True)
        atomic.write_folder(path, fill)


def _write(
    store: DatastoreReader,
    chosen_n: npt.NDArray[np.int64],
    folder: Path,
    how: dict[str, float | int],
) -> None:
    origin = {"parent": store.digest, **how}
    manifest = replace(store.manifest, shards=(), documents=0, complete=False, subsample=origin)
    (folder / "README.md").write_text(card(manifest, len(chosen_n), store.documents), "utf-8")
    size = manifest.shard_size
    corpus = hashlib.sha256(repr(sorted(origin.items())).encode()).hexdigest()
    # A document begins, in the sample, at the number of chosen entries before it.
    starts_m = np.searchsorted(chosen_n, store.document_starts.numpy()).astype(np.int64)
    last = (len(chosen_n) - 1) // size
    shard_m = np.minimum(starts_m // size, last)
    with closing(StoreWriter(folder, manifest)) as writer:
        for i in range(last + 1):
            ids_n = torch.from_numpy(chosen_n[i * size : (i + 1) * size])
            values_n = store.values[ids_n].numpy()
            writer.put(ShardText(values_n, starts_m[shard_m == i], corpus))
            for some_n in torch.split(ids_n, _ROWS):
                writer.append(store.keys[some_n])
        writer.finish(store.documents)
