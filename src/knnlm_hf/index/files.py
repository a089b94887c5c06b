"""Build indexes over a store's keys, keep them, and open them again by metric and spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import faiss, faiss_build, faiss_files, faiss_library, records
from knnlm_hf.index.auto import choose, must_refine
from knnlm_hf.index.base import IndexInfo, SearchIndex
from knnlm_hf.index.exact import ExactIndex
from knnlm_hf.index.selfcheck import self_check
from knnlm_hf.types import KeyRows, check_metric

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed


def build_index(
    keys: KeyRows,
    values: Tensor,
    folder: str | Path,
    spec: str = "auto",
    *,
    metric: str = "l2",
    digest: str,
    nprobe: int | None = None,
    seed: int = 0,
    progress: bool = True,
    removed: Removed | None = None,
) -> SearchIndex:
    """Build an index over all keys, check it against exact search, and keep it in `folder`.

    Args:
        keys: N stored keys.
        values: (N,) their tokens.
        folder: where the store keeps its indexes; the index gets a folder of its own in it, and
            replaces one of the same metric and factory string.
        spec: `auto`, `exact`, or a FAISS factory string, which may end in `Refine(keys)`.
        metric: `l2` or `ip`.
        digest: identifies the keys.
        nprobe: inverted lists visited per query; default: `faiss_build.default_nprobe`.
        seed: of the training sample and the self-check. Equal seeds give equal indexes.
        progress: show progress, and a line with the self-check.
        removed: entries that the self-check leaves out. The index holds them all the same: its
            numbers are those of the entries.

    Returns:
        The index, as `open_index` gives it; its `info` holds the self-check.

    Raises:
        SettingError: unknown metric.
        SearchIndexError: it cannot be built as asked, or not be written.
    """
    metric = check_metric(metric)
    if len(keys) == 0:
        raise SearchIndexError("the store has no entries: there is nothing to index")
    factory = spec
    if spec == "auto":
        factory = choose(len(keys), keys.dim, metric)
    facts: dict[str, Any] = {
        "spec": spec, "factory": factory, "metric": metric, "dim": keys.dim, "entries": len(keys),
        "digest": digest, "seed": seed, "nprobe": None, "bytes": 0, "sha256": "",
        "faiss_version": "", "trained": len(keys),
    }  # fmt: skip
    index: SearchIndex
    filled: Any = None
    if factory == "exact":
        index = ExactIndex(keys, metric)
    else:
        filled = faiss_build.empty_index(factory, keys.dim, metric)
        faiss_build.fill(filled, keys, factory, seed=seed, nprobe=nprobe, progress=progress)
        refines = faiss_build.split_spec(factory)[1]
        index = wrapped = faiss.FaissIndex(filled, metric, keys=keys if refines else None)
        facts |= {"nprobe": wrapped.nprobe, "faiss_version": faiss_library.version()}
    check = self_check(index, keys, values, seed=seed, removed=removed)
    key_bytes = len(keys) * keys.dim * keys[:1].element_size()
    if spec == "auto" and filled is not None and must_refine(check, key_bytes):
        factory = f"{factory},{faiss_build.REFINE_KEYS}"
        index = faiss.FaissIndex(filled, metric, keys=keys)
        check = self_check(index, keys, values, seed=seed, removed=removed)
    facts |= {"factory": factory, "self_check": check}
    home = records.home_of(folder, metric, factory)
    info = records.write(home, filled, facts)
    records.drop_replaced(folder, digest)
    if progress:
        show(info)
    if filled is not None:
        return _open(keys, home, info)
    index.info = info
    return index


def open_index(
    keys: KeyRows,
    folder: str | Path,
    *,
    spec: str = "auto",
    metric: str = "l2",
    digest: str,
) -> SearchIndex | None:
    """Open a built index.

    Args:
        keys: the stored keys.
        folder: where the store keeps its indexes.
        spec: `auto` for the newest of this metric; or one that was built, by its factory string;
            `exact` needs none built.
        metric: `l2` or `ip`.
        digest: identifies the keys.

    Returns:
        The index; None where no index was built at all.

    Raises:
        SettingError: unknown metric.
        SearchIndexError: only others were built; or it is older than its store, or damaged.
    """
    metric = check_metric(metric)
    built = records.built_indexes(folder)
    fitting = [
        (home, info)
        for home, info in built
        if info.metric == metric and spec in ("auto", info.spec, info.factory)
    ]
    fresh = [(home, info) for home, info in fitting if info.digest == digest]
    if spec == "exact":
        exact = ExactIndex(keys, metric)
        exact.info = fresh[-1][1] if fresh else None
        return exact
    if not built:
        return None
    if not fitting:
        there = ", ".join(f"{info.factory} ({info.metric})" for _, info in built)
        asked = metric if spec == "auto" else f"{spec} ({metric})"
        raise SearchIndexError(
            f"{folder} has no index for {asked}, only {there}: build it with "
            f'store.build_index({spec!r}, metric="{metric}"), or use index="exact"'
        )
    home, info = (fresh or fitting)[-1]
    if info.digest != digest or info.entries != len(keys) or info.dim != keys.dim:
        raise SearchIndexError(
            f"{home} is older than its store (made for {info.entries} entries, {info.dim}-d, "
            f"digest {info.digest[:12]}; the store has {len(keys)}, {keys.dim}-d, {digest[:12]}): "
            f'rebuild it with store.build_index({info.spec!r}, metric="{metric}")'
        )
    return _open(keys, home, info)


def _open(keys: KeyRows, home: Path, info: IndexInfo) -> SearchIndex:
    """Open the index of one folder; FAISS sees its file only after the checksum."""
    index: SearchIndex
    if info.factory == "exact":
        index = ExactIndex(keys, info.metric)
    else:
        path = records.index_file(home, info)
        refines = faiss_build.split_spec(info.factory)[1]
        index = wrapped = faiss.FaissIndex(
            faiss_files.to_gpu(faiss_files.read(path)), info.metric, keys=keys if refines else None
        )
        if len(index) != info.entries or index.dim != info.dim:
            raise SearchIndexError(
                f"{path} holds {len(index)} {index.dim}-d keys, expected {info.entries} "
                f"{info.dim}-d ones: rebuild it with store.build_index({info.spec!r}, "
                f'metric="{info.metric}")'
            )
        if info.nprobe is not None:
            wrapped.nprobe = info.nprobe
    index.info = info
    return index


def show(info: IndexInfo) -> None:
    """One line: what was built, and how it compares with exact search."""
    from rich.console import Console

    check = info.self_check
    line = f"[bold]{info.factory}[/bold] ({info.metric}): {info.bytes_per_entry:.0f} bytes/entry"
    if "recall" in check:
        line += (
            f", recall@{check['k']:.0f} {check['recall']:.3f}, distance error "
            f"{check['distance_error']:.1%}, entropy {check['entropy']:.2f} (exact "
            f"{check['exact_entropy']:.2f}), suggested t {check['temperature']:.3g}"
        )
    Console(stderr=True).print(line)
