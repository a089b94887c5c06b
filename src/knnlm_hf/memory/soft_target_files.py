"""The folder of soft targets: its manifest and shards, written whole or not at all.

    <folder>/manifest.json                the store and teacher it is of, and its shards' checksums
    <folder>/targets-00000.safetensors    `tokens` (n, T) and `probs` (n, T) of `shard_size` entries

Nothing in it is trusted.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from knnlm_hf.datastore import atomic
from knnlm_hf.errors import DatastoreError, first_line
from knnlm_hf.untrusted import inside, is_count, read_json

NAME = "manifest.json"
FORMAT = "knnlm_hf soft targets"
VERSION = 1
MOST_UINT16 = 1 << 16
"""Vocabularies up to this have their tokens in 16 bits."""


@dataclass(frozen=True)
class TargetShard:
    """One finished file."""

    file: str
    rows: int
    bytes: int
    sha256: str
    answered: int
    """Entries that have a neighbour."""
    kept: float
    """Summed over those, the probability of the tokens that were kept."""


@dataclass(frozen=True)
class TargetManifest:
    """What the targets are of, and which are there."""

    store: str
    """Digest of the datastore."""
    entries: int
    vocab_size: int
    tokens: int
    """T."""
    shard_size: int
    teacher: dict[str, Any]
    """k, temperature, metric, rescore and index of the kNN memory."""
    shards: tuple[TargetShard, ...] = ()

    @property
    def rows(self) -> int:
        """Entries in the finished shards."""
        return sum(shard.rows for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write the manifest atomically."""
        text = json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1)
        atomic.write_bytes(folder / NAME, text.encode())


def append_shard(
    folder: Path, manifest: TargetManifest, blocks: list[tuple[Tensor, Tensor, Tensor]]
) -> TargetManifest:
    """Write one shard, then the manifest that names it."""
    tokens_nT, probs_nT, kept_n = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    dtype = torch.uint16 if manifest.vocab_size <= MOST_UINT16 else torch.int32
    path = folder / f"targets-{len(manifest.shards):05d}.safetensors"
    tensors = {"tokens": tokens_nT.to(dtype), "probs": probs_nT.half()}
    sha256 = atomic.write_tensors(path, tensors)
    shard = TargetShard(
        path.name, len(kept_n), path.stat().st_size, sha256,
        int((kept_n > 0).sum()), float(kept_n.double().sum()),
    )  # fmt: skip
    manifest = replace(manifest, shards=(*manifest.shards, shard))
    manifest.save(folder)
    return manifest


def existing(folder: Path, wanted: TargetManifest) -> TargetManifest:
    """The manifest in `folder`, if it is of the same store and teacher; else the one wanted."""
    atomic.clear(folder)
    if not (folder / NAME).exists():
        return wanted
    found = read_manifest(folder)
    for field in fields(TargetManifest):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if field.name != "shards" and theirs != ours:
            raise DatastoreError(
                f"{folder}: the soft targets there have {field.name} {theirs!r}, expected "
                f"{ours!r}: remove them, or choose another folder"
            )
    return found


def read_manifest(folder: Path) -> TargetManifest:
    """Read and check the manifest of a folder, finished or not.

    Raises:
        DatastoreError: there is none, or it is damaged or of another format.
    """
    if not folder.is_dir():
        raise DatastoreError(f"{folder}: no such folder: build the soft targets first")
    data = read_json(folder, NAME, DatastoreError)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DatastoreError(f"{folder / NAME}: not the manifest of {FORMAT}")
    if data.get("version") != VERSION:
        raise DatastoreError(
            f"{folder / NAME}: format version {data.get('version')!r}, this knnlm_hf reads "
            f"{VERSION}: upgrade knnlm_hf, or build them again"
        )
    try:
        shards = tuple(
            TargetShard(**{f.name: shard[f.name] for f in fields(TargetShard)})
            for shard in data["shards"]
        )
        values = {f.name: data[f.name] for f in fields(TargetManifest)}
        manifest = TargetManifest(**values | {"shards": shards})
        is_sound = _is_sound(manifest)
    except (KeyError, TypeError) as error:
        raise DatastoreError(
            f"{folder / NAME}: is damaged ({error!r}): build the soft targets again"
        ) from error
    if not is_sound:
        raise DatastoreError(f"{folder / NAME}: is damaged: build the soft targets again")
    return manifest


def _is_sound(manifest: TargetManifest) -> bool:
    counts = [manifest.entries, manifest.vocab_size, manifest.tokens, manifest.shard_size]
    counts += [number for shard in manifest.shards for number in (shard.rows, shard.bytes)]
    whole = manifest.shards if manifest.rows < manifest.entries else manifest.shards[:-1]
    return (
        all(is_count(count) for count in counts)
        and manifest.rows <= manifest.entries
        and isinstance(manifest.teacher, dict)
        and all(shard.rows == manifest.shard_size for shard in whole)
        and all(is_count(s.answered, s.rows, least=0) for s in manifest.shards)
        and all(isinstance(s.kept, int | float) and isfinite(s.kept) for s in manifest.shards)
        and all(re.fullmatch(r"targets-\d{5,}\.safetensors", s.file) for s in manifest.shards)
    )


def load_shard(folder: Path, shard: TargetShard, manifest: TargetManifest) -> tuple[Tensor, Tensor]:
    """Mapped tokens and probabilities; tokens below 2¹⁶ as the int16 of the same bits."""
    path = inside(folder, shard.file, DatastoreError)
    if path.stat().st_size != shard.bytes:
        raise DatastoreError(
            f"{path}: has {path.stat().st_size} bytes, expected {shard.bytes}: build it again"
        )
    try:
        tensors = load_file(path)
        tokens_nT, probs_nT = tensors["tokens"], tensors["probs"]
    except Exception as error:
        raise DatastoreError(f"{path}: is damaged: {first_line(error)}") from error
    if tokens_nT.dtype == torch.uint16:
        tokens_nT = tokens_nT.view(torch.int16)
    shape, dtypes = (shard.rows, manifest.tokens), (tokens_nT.dtype, probs_nT.dtype)
    is_sound = dtypes in ((torch.int16, torch.float16), (torch.int32, torch.float16))
    if tokens_nT.shape != shape or probs_nT.shape != shape or not is_sound:
        raise DatastoreError(f"{path}: is damaged: not {shape[0]} × {shape[1]} soft targets")
    return tokens_nT, probs_nT
