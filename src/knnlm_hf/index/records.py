"""Indexes on the disk: one folder each, that says what it holds.

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

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import faiss_files
from knnlm_hf.index.base import IndexInfo
from knnlm_hf.types import METRICS, Metric
from knnlm_hf.untrusted import inside, is_count, read_json

FORMAT = 1
RECORD = "index.json"
_MOST_RECORD = 1 << 20  # bytes
_FIELDS: dict[str, Any] = {
    "spec": str, "factory": str, "metric": str, "dim": int, "entries": int, "digest": str,
    "nprobe": (int, type(None)), "seed": int, "bytes": int, "sha256": str, "built_at": str,
    "faiss_version": str, "self_check": dict, "trained": int,
}  # fmt: skip


def home_of(folder: str | Path, metric: Metric, factory: str) -> Path:
    """Where the store's index of this kind is kept."""
    return Path(folder) / (f"{metric}-" + re.sub(r"[^A-Za-z0-9_.]+", "-", factory).strip("-"))


def index_file(home: Path, info: IndexInfo) -> Path:
    """The checked path of an index's file: of the size and checksum that its record says.

    Raises:
        SearchIndexError: it is missing or damaged, or lies elsewhere.
    """
    rebuild = f'rebuild it with store.build_index({info.spec!r}, metric="{info.metric}")'
    name = _file_name(info.sha256)
    if not (home / name).is_file():
        raise SearchIndexError(f"{home / name} is missing: {rebuild}")
    path = inside(home, name, SearchIndexError)
    if path.stat().st_size != info.bytes:
        raise SearchIndexError(
            f"{path} has {path.stat().st_size} bytes, expected {info.bytes}: {rebuild}"
        )
    if file_sha256(path) != info.sha256:
        raise SearchIndexError(f"{path} is damaged, its checksum differs: {rebuild}")
    return path


def write(home: Path, filled: Any, facts: dict[str, Any]) -> IndexInfo:
    """Write the file, then its record, then remove what the folder held before.

    Args:
        home: folder of this index.
        filled: a FAISS index, or None for `exact`.
        facts: of `IndexInfo`, but for what is known only now.

    Raises:
        SearchIndexError: it cannot be written.
    """
    temporary = home / f"building-{uuid4().hex}.tmp"
    try:
        home.mkdir(parents=True, exist_ok=True)
        atomic.clear(home)
        if filled is not None:
            faiss_files.write(filled, temporary)
            facts |= {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            atomic.settle(temporary, home / _file_name(facts["sha256"]))
        facts["built_at"] = datetime.now(UTC).isoformat(timespec="microseconds")
        info = IndexInfo(**facts)
        text = json.dumps({"format": FORMAT, **info.to_dict()}, indent=2)
        atomic.write_bytes(home / RECORD, (text + "\n").encode())
    except OSError as error:
        raise SearchIndexError(f"{home}: cannot write the index: {error}") from error
    finally:
        atomic.discard(temporary)
    for old in home.glob("*.faiss"):
        if old.name != _file_name(info.sha256):
            atomic.discard(old)
    return info


def built_indexes(folder: str | Path) -> list[tuple[Path, IndexInfo]]:
    """The folders of all built indexes and what they hold, oldest first.

    Raises:
        SearchIndexError: an `index.json` that is damaged.
    """
    found = []
    for path in Path(folder).glob(f"*/{RECORD}"):
        try:
            found.append((path.parent, _read(path.parent)))
        except SearchIndexError:
            if path.exists():  # else a writer has just removed it
                raise
    return sorted(found, key=lambda home_info: (home_info[1].built_at, str(home_info[0])))


def drop_replaced(folder: str | Path, digest: str) -> None:
    """Delete the indexes of other contents that one of these contents stands in for."""
    built = built_indexes(folder)
    fresh = {(info.metric, info.factory) for _, info in built if info.digest == digest}
    for home, info in built:
        if info.digest != digest and (info.metric, info.factory) in fresh:
            atomic.discard(home / RECORD)  # first: what is left is no index
            atomic.discard(home)


def _read(home: Path) -> IndexInfo:
    """Read and check a record: it may come from a stranger."""
    path = home / RECORD
    stored = read_json(home, RECORD, SearchIndexError, _MOST_RECORD)
    if not isinstance(stored, dict) or "format" not in stored:
        raise SearchIndexError(f"{path} is damaged: not the record of an index")
    if stored["format"] != FORMAT:
        raise SearchIndexError(
            f"{path} has the format {stored['format']!r}, this version reads {FORMAT}: "
            "update knnlm-hf, or rebuild the index"
        )
    facts = {"trained": stored.get("entries"), **stored}  # what had no `trained` was not added to
    for name, kind in _FIELDS.items():
        if not isinstance(facts.get(name), kind) or isinstance(facts[name], bool):
            raise _damaged(path, name, facts.get(name))
    for name in ("dim", "entries", "trained"):
        if not is_count(facts[name]):
            raise _damaged(path, name, facts[name])
    if not re.fullmatch(r"([0-9a-f]{64})?", facts["sha256"]):
        raise _damaged(path, "sha256", facts["sha256"])
    if facts["metric"] not in METRICS:
        raise _damaged(path, "metric", facts["metric"])
    for name, value in facts["self_check"].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= _MOST_CHECK or not isfinite(value):
            raise _damaged(path, name, value)
        if name == "temperature" and value <= 0:
            raise _damaged(path, name, value)
    return IndexInfo(**{name: facts[name] for name in _FIELDS})


_MOST_CHECK = 1e300  # an int beyond has no float


def _damaged(path: Path, name: str, value: Any) -> SearchIndexError:
    return SearchIndexError(f"{path} is damaged: {name} is {repr(value)[:80]}: rebuild the index")


def _file_name(sha256: str) -> str:
    return f"index-{sha256[:16]}.faiss"
