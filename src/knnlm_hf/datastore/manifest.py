"""manifest.json: what a datastore holds and with what it was made; nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from knnlm_hf.datastore import atomic
from knnlm_hf.errors import DatastoreError
from knnlm_hf.identity import is_description
from knnlm_hf.untrusted import is_count, read_json

NAME = "manifest.json"
FORMAT = "knnlm_hf datastore"
VERSION = 2
"""The newest format that is read. A store is written as 1, and as 2 once documents were removed:
who cannot read that must not read the store."""
DATA_START = 4096
"""Bytes before a shard's first key: the safetensors header, padded with spaces."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The dtypes that keys may have."""


@dataclass(frozen=True)
class Shard:
    """One finished file of entries."""

    file: str
    """Plain name inside the store's folder."""
    rows: int
    """Entries in it; the manifest's `shard_size` in all shards but the last."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the whole file."""
    corpus: str
    """Sha-256 of the corpus up to the shard's end: every document's first token and values."""


@dataclass(frozen=True)
class Removal:
    """The side file that names the removed documents."""

    bytes: int
    """Size of the file."""
    sha256: str
    """Of the whole file."""
    documents: int
    """How many it names."""

    @property
    def file(self) -> str:
        """Plain name inside the store's folder."""
        return f"removed-{self.sha256[:16]}.json"


@dataclass(frozen=True)
class Appended:
    """What one `append` added."""

    documents: int
    corpus: str
    """Sha-256 of its corpus, as of a shard."""


@dataclass(frozen=True)
class Manifest:
    """The settings and state of a datastore."""

    layer: str
    dim: int
    dtype: str
    vocab_size: int
    window: int
    stride: int
    batch_size: int
    shard_size: int
    bos: bool
    model: dict[str, Any]
    """`identity.describe` of the model and tokenizer that built the store."""
    shards: tuple[Shard, ...] = ()
    documents: int = 0
    """Corpus items, known once complete."""
    complete: bool = False
    subsample: dict[str, Any] | None = None
    """{"parent": digest, "fraction", "seed"} of a store drawn from another."""
    removed: Removal | None = None
    """The removed documents; not written where there are none."""
    appended: tuple[Appended, ...] = ()
    """The appends, in order; not written where there are none."""

    @property
    def entries(self) -> int:
        """Entries in the finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.dim * DTYPES[self.dtype].itemsize

    @property
    def rows_digest(self) -> str:
        """Sha-256 that identifies the rows, by their checksums: what an index is built over."""
        parts = ["1", str(self.entries), *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def goes_on(self, earlier: Manifest) -> bool:
        """Whether this is a state of the same store as the `earlier` one, or of it grown."""
        if len(self.appended) == len(earlier.appended):
            return self.shards == earlier.shards
        same = self.appended[: len(earlier.appended)] == earlier.appended
        kept = earlier.shards[:-1]
        return same and self.shards[: len(kept)] == kept

    def document_count(self, shard: Shard) -> int:
        """How many documents begin in a shard, by the size of its file."""
        return (shard.bytes - DATA_START - shard.rows * (self.row_bytes + 4)) // 8

    def save(self, folder: Path) -> None:
        """Write the manifest atomically; equal manifests give equal bytes."""
        version = 1 if self.removed is None else 2
        facts = {"format": FORMAT, "version": version, "entries": self.entries, **asdict(self)}
        for name in _OPTIONAL:
            if not facts[name]:
                del facts[name]
        text = json.dumps(facts, indent=1) + "\n"
        atomic.write_bytes(folder / NAME, text.encode())


def load(folder: Path) -> Manifest:
    """Read and check the manifest of the store in `folder`.

    Raises:
        DatastoreError: there is none, or it is damaged, of a newer format, or names files outside.
    """
    path = folder / NAME
    if not path.is_file():
        raise DatastoreError(f"{folder}: no datastore there (it has no {NAME})")
    data = read_json(folder, NAME, DatastoreError)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DatastoreError(f"{path}: not the manifest of a {FORMAT}")
    version = data.get("version")
    if not is_count(version) or version > VERSION:
        raise DatastoreError(
            f"{path}: format version {version!r}, but this knnlm_hf reads up to {VERSION}: "
            "upgrade knnlm_hf"
        )
    manifest = _parse(data, path)
    _check_shards(manifest, path)
    if data.get("entries") != manifest.entries:
        raise DatastoreError(
            f"{path}: claims {data.get('entries')!r} entries, its shards have {manifest.entries}"
        )
    return manifest


def _is_sha(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_plain_name(value: Any) -> bool:
    """Whether it names a file *in* the folder, on any system."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", value) is not None


_MOST_TOKENS = 1 << 24  # a vocabulary: one row of its distribution is 64 MiB
_OPTIONAL: dict[str, Any] = {"removed": None, "appended": []}  # what an absent field stands for
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layer": (lambda v: isinstance(v, str) and v != "", "a name"),
    "dim": (is_count, "a count"),
    "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "vocab_size": (lambda v: is_count(v, _MOST_TOKENS), f"a count up to {_MOST_TOKENS}"),
    "window": (is_count, "a count"),
    "stride": (is_count, "a count"),
    "batch_size": (is_count, "a count"),
    "shard_size": (is_count, "a count"),
    "bos": (lambda v: isinstance(v, bool), "true or false"),
    "model": (is_description, "the identity of a model"),
    "shards": (lambda v: isinstance(v, list), "a list"),
    "documents": (lambda v: is_count(v, least=0), "a count"),
    "complete": (lambda v: isinstance(v, bool), "true or false"),
    "subsample": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "removed": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "appended": (lambda v: isinstance(v, list), "a list"),
    "file": (_is_plain_name, "the plain name of a safetensors file inside the store"),
    "rows": (is_count, "a count"),
    "bytes": (is_count, "a count"),
    "sha256": (_is_sha, "64 hexadecimal digits"),
    "corpus": (_is_sha, "64 hexadecimal digits"),
}


def _checked(data: Any, kind: type, path: Path) -> dict[str, Any]:
    """The fields of the dataclass `kind` from JSON, each of the type and range it must have."""
    if not isinstance(data, dict):
        raise DatastoreError(f"{path}: a {kind.__name__.lower()} is {data!r}, expected an object")
    values = {}
    for field in fields(kind):
        check, expected = _CHECKS[field.name]
        values[field.name] = data.get(field.name, _OPTIONAL.get(field.name))
        is_there = field.name in data or field.name in _OPTIONAL
        if not is_there or not check(values[field.name]):
            found = repr(data.get(field.name, "missing"))[:80]
            raise DatastoreError(f"{path}: field {field.name!r} is {found}, expected {expected}")
    return values


def _parse(data: dict[str, Any], path: Path) -> Manifest:
    values = _checked(data, Manifest, path)
    values["shards"] = tuple(Shard(**_checked(s, Shard, path)) for s in values["shards"])
    values["appended"] = tuple(Appended(**_checked(a, Appended, path)) for a in values["appended"])
    if values["removed"] is not None:
        values["removed"] = Removal(**_checked(values["removed"], Removal, path))
    return Manifest(**values)


def _check_shards(manifest: Manifest, path: Path) -> None:
    if len({shard.file for shard in manifest.shards}) != len(manifest.shards):
        raise DatastoreError(f"{path}: names a shard twice")
    if manifest.complete and not manifest.shards:
        raise DatastoreError(f"{path}: complete, but without a shard")
    for i, shard in enumerate(manifest.shards):
        is_last = manifest.complete and i == len(manifest.shards) - 1
        if shard.rows > manifest.shard_size or (shard.rows < manifest.shard_size and not is_last):
            raise DatastoreError(
                f"{path}: {shard.file} has {shard.rows} rows, expected {manifest.shard_size}"
            )
        least = DATA_START + shard.rows * (manifest.row_bytes + 4)
        if shard.bytes < least or (shard.bytes - least) % 8:
            raise DatastoreError(
                f"{path}: {shard.file} has {shard.bytes} bytes, too few or too many for "
                f"{shard.rows} keys of {manifest.dim} {manifest.dtype}"
            )
    documents = sum(manifest.document_count(shard) for shard in manifest.shards)
    if manifest.complete and documents != manifest.documents:
        raise DatastoreError(
            f"{path}: claims {manifest.documents} documents, its shards have {documents}"
        )
    appended = sum(part.documents for part in manifest.appended)
    removed = 0 if manifest.removed is None else manifest.removed.documents
    if max(appended, removed) > manifest.documents:
        raise DatastoreError(
            f"{path}: claims {appended} appended and {removed} removed documents of "
            f"{manifest.documents}"
        )
