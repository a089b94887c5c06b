"""A store takes in staged entries, and so do its indexes.

New entries are added to an index without training it anew, where that is right; an index that is
not extended is stale, and says so when it is asked for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knnlm_hf.datastore import DatastoreReader, appending, atomic
from knnlm_hf.datastore.card import card
from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import faiss, faiss_build, faiss_files, records
from knnlm_hf.index.base import IndexInfo, SearchIndex
from knnlm_hf.index.exact import ExactIndex
from knnlm_hf.index.selfcheck import self_check
from knnlm_hf.types import KeyRows

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed

_log = logging.getLogger(__name__)
MOST_GROWTH = 2
"""An index that had to be trained is right for so many times the entries it was trained on."""
MOST_RECALL_LOST = 0.05
"""Recall that an extended index may have lost, by its self-check."""


def extend_indexes(
    keys: KeyRows,
    values: Tensor,
    folder: str | Path,
    *,
    before: str,
    digest: str,
    removed: Removed | None = None,
    progress: bool = True,
) -> None:
    """Write, beside each index of the earlier contents, one that holds the new entries too.

    The earlier ones stay, for whoever has the earlier contents open: see `records.drop_replaced`.

    Args:
        keys: the stored keys, old and new.
        values: (N,) their tokens.
        folder: where the store keeps its indexes.
        before: identifies the earlier keys, the first of `keys`.
        digest: identifies all keys.
        removed: see `build_index`.
        progress: show progress.

    Raises:
        SearchIndexError: an extended index cannot be written.
    """
    for home, info in records.built_indexes(folder):
        if info.digest != before:
            continue
        try:
            index, filled, trained = _extended(home, info, keys, progress)
            why = f"it was trained on {info.trained:,} entries, of now {len(keys):,}"
        except SearchIndexError as error:
            index, filled, trained, why = None, None, 0, str(error)
        facts = {**vars(info), "digest": digest, "entries": len(keys), "trained": trained}
        if index is not None:
            why = ""
            checks = self_check(index, keys, values, seed=info.seed, removed=removed)
            lost = info.self_check.get("recall", 0.0) - checks.get("recall", 0.0)
            if lost > MOST_RECALL_LOST:
                why = f"its recall would fall by {lost:.2f}"
            facts["self_check"] = checks
        if why:
            _log.warning(
                "%s: the index %s is not extended, %s: rebuild it with "
                "store.build_index(%r, metric=%r)",
                home, info.factory, why, info.spec, info.metric,
            )  # fmt: skip
        else:
            place = records.home_of(folder, info.metric, info.factory)
            records.write(place.with_name(f"{place.name}.{digest[:12]}"), filled, facts)


def take_in(store: DatastoreReader, staged: DatastoreReader, progress: bool) -> None:
    """Write rows and indexes that hold the staged entries too, then the manifest."""
    path = store.path
    with atomic.explaining(path):
        manifest = appending.merge(store, staged)
    grown = DatastoreReader(path, manifest)
    extend_indexes(
        grown.keys, grown.values, path / "indexes", before=store.manifest.rows_digest,
        digest=manifest.rows_digest, removed=grown.removed, progress=progress,
    )  # fmt: skip
    with atomic.explaining(path):
        text = card(manifest, manifest.entries, manifest.documents)
        atomic.write_bytes(path / "README.md", text.encode())
        manifest.save(path)
    records.drop_replaced(path / "indexes", manifest.rows_digest)


def _extended(
    home: Path, info: IndexInfo, keys: KeyRows, progress: bool
) -> tuple[SearchIndex | None, Any, int]:
    """The index with all keys in it, its FAISS index, and on how many it was trained.

    No index where the new entries are too many for what was learnt from the old ones.
    """
    if info.factory == "exact":
        return ExactIndex(keys, info.metric), None, len(keys)
    needs_training = not faiss_build.empty_index(info.factory, info.dim, info.metric).is_trained
    if needs_training and len(keys) > MOST_GROWTH * info.trained:
        return None, None, info.trained
    filled = faiss_files.read(records.index_file(home, info), mapped=False)
    if filled.ntotal != info.entries or filled.d != info.dim:
        raise SearchIndexError(f"{home}: holds {filled.ntotal} keys, expected {info.entries}")
    faiss_build.add(filled, keys, info.factory, progress=progress)
    refines = faiss_build.split_spec(info.factory)[1]
    index = faiss.FaissIndex(filled, info.metric, keys=keys if refines else None)
    if info.nprobe is not None:
        index.nprobe = info.nprobe
    return index, filled, info.trained if needs_training else len(keys)
