"""Shards on their way to the disk: keys are streamed, so memory does not grow with them.

A shard is a safetensors file of `keys` (n, D), `values` (n,) int32 and `document_starts` (m,)
int64: for each document that begins in the shard, the number of its first entry in the whole store
(for a document without entries, of the next one). Its header has a fixed size, padded with spaces
as the format allows, and is written last.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.datastore.manifest import DATA_START, Manifest, Shard
from knnlm_hf.datastore.mapping import HUGE_PAGE

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ShardText:
    """What a shard holds besides its keys."""

    values: npt.NDArray[np.int32]
    document_starts: npt.NDArray[np.int64]
    corpus: str
    """Sha-256 of the corpus up to the shard's end."""


def shard_header(manifest: Manifest, rows: int, documents: int) -> bytes:
    """The first `DATA_START` bytes of a shard of `rows` entries where `documents` begin."""
    sizes: dict[str, tuple[str, list[int], int]] = {
        "keys": (
            SAFETENSORS_DTYPES[manifest.dtype],
            [rows, manifest.dim],
            rows * manifest.row_bytes,
        ),
        "values": ("I32", [rows], rows * 4),
        "document_starts": ("I64", [documents], documents * 8),
    }
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in sizes.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table).encode()
    length = DATA_START - 8
    return struct.pack("<Q", length) + text + b" " * (length - len(text))


class StoreWriter:
    """Appends entries to the store in `folder`, continuing after the manifest's last shard.

    Keys come with `append`, in entry order. The rest of each shard comes with `put`, in shard
    order and no later than the shard's last key; a full shard is closed when the next key comes, so
    that the last one is closed by `finish`, together with the manifest's `complete`.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, suffix: str = "", publish: bool = True
    ) -> None:
        """Go on after the manifest's shards.

        Args:
            folder: of the store.
            manifest: its settings and finished shards.
            suffix: of the names of new shards, before `.safetensors`.
            publish: write the manifest after every shard; else it is the caller's to save.
        """
        self.manifest = manifest
        self._suffix, self._publish = suffix, publish
        self._folder = folder
        self._texts: deque[ShardText] = deque()
        self._file: IO[bytes] | None = None
        self._unwritten = bytearray()
        self._rows = 0

    def close(self) -> None:
        """Let go of the shard in progress, which is lost; nothing to do after `finish`."""
        if self._file is not None:
            self._file.close()
            self._file = None
            atomic.discard(atomic.temporary(self._path))

    @property
    def _path(self) -> Path:
        return self._folder / f"shard-{len(self.manifest.shards):05d}{self._suffix}.safetensors"

    def put(self, text: ShardText) -> None:
        """Hand over the values and document starts of the next shard that has none yet."""
        self._texts.append(text)

    def append(self, keys_ND: Tensor) -> None:
        """Append keys in the store's dtype, on the CPU."""
        keys_ND = keys_ND.contiguous()
        if keys_ND.dtype == torch.bfloat16:  # numpy has no such type
            keys_ND = keys_ND.view(torch.int16)
        rows = keys_ND.numpy()
        while len(rows):
            if self._rows == self.manifest.shard_size:
                self._close(self._texts.popleft())
            room = self.manifest.shard_size - self._rows
            self._write(rows[:room])
            rows = rows[room:]

    def finish(self, documents: int) -> Manifest:
        """Close the last shard, and the store with it; all texts must have been put."""
        self._close(self._texts.popleft(), documents)
        return self.manifest

    def _write(self, rows: npt.NDArray[Any]) -> None:
        if self._file is None:
            self._file = atomic.temporary(self._path).open("wb", buffering=0)
            self._unwritten = bytearray(DATA_START)  # a header to be
        self._unwritten += rows.data.cast("B")
        self._rows += len(rows)
        # What is written in whole huge pages lies in such in the system's cache, too.
        whole = len(self._unwritten) // HUGE_PAGE * HUGE_PAGE
        if whole:
            with memoryview(self._unwritten) as view:
                atomic.write_all(self._file, view[:whole])
            del self._unwritten[:whole]

    def _close(self, text: ShardText, documents: int | None = None) -> None:
        assert self._file is not None
        assert len(text.values) == self._rows
        path, file = self._path, self._file
        atomic.write_all(file, self._unwritten)
        atomic.write_all(file, text.values)
        atomic.write_all(file, text.document_starts)
        size = file.tell()
        file.seek(0)
        atomic.write_all(file, shard_header(self.manifest, self._rows, len(text.document_starts)))
        atomic.sync(file.fileno())
        file.close()
        self._file = None
        unfinished = atomic.temporary(path)
        shard = Shard(path.name, self._rows, size, file_sha256(unfinished), text.corpus)
        atomic.publish(unfinished, path)
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        if documents is not None:
            self.manifest = replace(self.manifest, documents=documents, complete=True)
        if self._publish:
            self.manifest.save(self._folder)
        self._rows = 0
