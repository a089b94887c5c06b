"""Built indexes on disk: one folder each, found again by metric and spec.

    <folder>/l2-IVF1024-PQ64x4fs-Refine-keys/index.json           what it is, and its checks
    <folder>/l2-IVF1024-PQ64x4fs-Refine-keys/index-<sha>.faiss    absent for `exact`

`index.json` is replaced last and atomically, and names its file by content: whatever moment a build
dies at, the folder holds the old index or the new one.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from knnlm_hf.datastore.atomic import publish, sync
from knnlm_hf.datastore.writer import file_sha256
from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import faiss
from knnlm_hf.index.auto import choose
from knnlm_hf.index.base import IndexInfo, SearchIndex
from knnlm_hf.index.exact import ExactIndex
from knnlm_hf.index.selfcheck import self_check
from knnlm_hf.types import METRICS, KeyRows, Metric, check_metric

FORMAT = 1
_FIELDS: dict[str, Any] = {
    "spec": str, "factory": str, "metric": str, "dim": int, "entries": int, "digest": str,
    "nprobe": (int, type(None)), "seed": int, "bytes": int, "sha256": str, "built_at": str,
    "faiss_version": str, "self_check": dict,
}  # fmt: skip


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
) -> SearchIndex:
    """Build an index over all keys, check it against exact search, and keep it in `folder`.

    Args:
        keys: N stored keys.
        values: (N,) their tokens.
        folder: where the store keeps its indexes; the index gets a folder of its own in it, and
            replaces one of the same metric and factory string.
        spec: `auto`, `exact`, or a FAISS factory string, which may end in `Refine(keys)`.
        metric: `l2` or `ip`.
        digest: identifies the store's contents.
        nprobe: inverted lists visited per query; default: `faiss.default_nprobe`.
        seed: of the training sample and the self-check. Equal seeds give equal indexes.
        progress: show progress, and a line with the self-check.

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
        factory = choose(len(keys), keys.dim, bytes_per_value=keys[:1].element_size())
    facts: dict[str, Any] = {
        "spec": spec, "factory": factory, "metric": metric, "dim": keys.dim, "entries": len(keys),
        "digest": digest, "seed": seed, "nprobe": None, "bytes": 0, "sha256": "",
        "faiss_version": "",
    }  # fmt: skip
    index: SearchIndex
    filled: Any = None
    if factory == "exact":
        index = ExactIndex(keys, metric)
    else:
        filled = faiss.empty_index(factory, keys.dim, metric)
        faiss.fill(filled, keys, factory, seed=seed, nprobe=nprobe, progress=progress)
        refines = faiss.split_spec(factory)[1]
        index = wrapped = faiss.FaissIndex(filled, metric, keys=keys if refines else None)
        facts |= {"nprobe": wrapped.nprobe, "faiss_version": faiss.version()}
    facts["self_check"] = self_check(index, keys, values, seed=seed)
    home = Path(folder) / _slug(metric, factory)
    try:
        info = _write(home, filled, facts)
    except OSError as error:
        raise SearchIndexError(f"{home}: cannot write the index: {error}") from error
    if progress:
        _print(info)
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
        digest: identifies the store's contents.

    Returns:
        The index; None where no index was built at all.

    Raises:
        SettingError: unknown metric.
        SearchIndexError: only others were built; or it is older than its store, or damaged.
    """
    metric = check_metric(metric)
    built = built_indexes(folder)
    fitting = [
        (home, info)
        for home, info in built
        if info.metric == metric and spec in ("auto", info.spec, info.factory)
    ]
    if spec == "exact":
        fresh = [info for _, info in fitting if info.digest == digest]
        exact = ExactIndex(keys, metric)
        exact.info = fresh[-1] if fresh else None
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
    home, info = fitting[-1]
    if info.digest != digest or info.entries != len(keys) or info.dim != keys.dim:
        raise SearchIndexError(
            f"{home} is older than its store (made for {info.entries} entries, {info.dim}-d, "
            f"digest {info.digest[:12]}; the store has {len(keys)}, {keys.dim}-d, {digest[:12]}): "
            f'rebuild it with store.build_index({info.spec!r}, metric="{metric}")'
        )
    return _open(keys, home, info)


def built_indexes(folder: str | Path) -> list[tuple[Path, IndexInfo]]:
    """The folders of all built indexes and what they hold, oldest first.

    Raises:
        SearchIndexError: an `index.json` that is damaged.
    """
    found = [(path.parent, _read_info(path)) for path in Path(folder).glob("*/index.json")]
    return sorted(found, key=lambda home_info: (home_info[1].built_at, str(home_info[0])))


def _open(keys: KeyRows, home: Path, info: IndexInfo) -> SearchIndex:
    """Open the index of one folder; FAISS sees its file only after the checksum."""
    index: SearchIndex
    if info.factory == "exact":
        index = ExactIndex(keys, info.metric)
    else:
        path = home / _file_name(info.sha256)
        rebuild = f'rebuild it with store.build_index({info.spec!r}, metric="{info.metric}")'
        if not path.is_file():
            raise SearchIndexError(f"{path} is missing: {rebuild}")
        if path.stat().st_size != info.bytes:
            raise SearchIndexError(
                f"{path} has {path.stat().st_size} bytes, expected {info.bytes}: {rebuild}"
            )
        if file_sha256(path) != info.sha256:
            raise SearchIndexError(f"{path} is damaged, its checksum differs: {rebuild}")
        refines = faiss.split_spec(info.factory)[1]
        index = wrapped = faiss.FaissIndex(
            faiss.to_gpu(faiss.read(path)), info.metric, keys=keys if refines else None
        )
        if len(index) != info.entries or index.dim != info.dim:
            raise SearchIndexError(
                f"{path} holds {len(index)} {index.dim}-d keys, expected {info.entries} "
                f"{info.dim}-d ones: {rebuild}"
            )
        if info.nprobe is not None:
            wrapped.nprobe = info.nprobe
    index.info = info
    return index


def _write(home: Path, filled: Any, facts: dict[str, Any]) -> IndexInfo:
    """Write the file, then `index.json`, then remove what the folder held before."""
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f"building-{uuid4().hex}.tmp"
    try:
        if filled is not None:
            faiss.write(filled, temporary)
            facts |= {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            _settle(temporary, home / _file_name(facts["sha256"]))
        facts["built_at"] = datetime.now(UTC).isoformat(timespec="microseconds")
        info = IndexInfo(**facts)
        text = json.dumps({"format": FORMAT, **info.to_dict()}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
        _settle(temporary, home / "index.json")
    finally:
        temporary.unlink(missing_ok=True)
    for old in home.glob("*.faiss"):
        if old.name != _file_name(info.sha256):
            old.unlink()
    return info


def _settle(temporary: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        sync(file.fileno())
    publish(temporary, path)


def _read_info(path: Path) -> IndexInfo:
    """Read and check an `index.json`: it may come from a stranger."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored["format"]
        facts = {name: stored[name] for name in _FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchIndexError(f"{path} is damaged ({error!r}): rebuild the index") from error
    if version != FORMAT:
        raise SearchIndexError(
            f"{path} has the format {version!r}, this version reads {FORMAT}: "
            "update knnlm-hf, or rebuild the index"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(facts[name], kind):
            raise SearchIndexError(f"{path} is damaged: {name} is {facts[name]!r}")
    if not re.fullmatch(r"([0-9a-f]{64})?", facts["sha256"]):
        raise SearchIndexError(f"{path} is damaged: its checksum is {facts['sha256']!r}")
    if facts["metric"] not in METRICS:
        raise SearchIndexError(f"{path} is damaged: metric is {facts['metric']!r}")
    for name, number in facts["self_check"].items():
        if not isinstance(number, int | float) or not isfinite(number):
            raise SearchIndexError(f"{path} is damaged: {name} is {number!r}")
    return IndexInfo(**facts)


def _slug(metric: Metric, factory: str) -> str:
    return f"{metric}-" + re.sub(r"[^A-Za-z0-9_.]+", "-", factory).strip("-")


def _file_name(sha256: str) -> str:
    return f"index-{sha256[:16]}.faiss"


def _print(info: IndexInfo) -> None:
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
