"""A finished datastore, memory-mapped."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from knnlm_hf import identity
from knnlm_hf.datastore import manifest as manifests
from knnlm_hf.datastore.manifest import DATA_START, DTYPES, Manifest, Shard
from knnlm_hf.datastore.mapping import Region, joined
from knnlm_hf.datastore.rows import Rows
from knnlm_hf.datastore.writer import file_sha256, shard_header
from knnlm_hf.errors import DatastoreError, first_line
from knnlm_hf.persistence import local_folder, push_folder
from knnlm_hf.progress import track

_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}
_CHECKED_ROWS = 1 << 14


class DatastoreReader:
    """N entries: key = hidden state before a token, (D,); value = the token."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the shards of a complete store; use `open`."""
        self.path = path
        self.manifest = manifest
        check_shards(path, manifest)
        self.keys = self._rows()

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Open the finished store in a folder, or in a dataset repository of the Hub.

        Sizes and headers are checked here; `verify` reads everything.

        Raises:
            DatastoreError: no store there, unfinished, damaged, or of a newer format.
            PersistenceError: neither a folder nor a repository that can be read.
        """
        options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        # The manifest first: a repository that is no store is not worth a download.
        folder = local_folder(source, "dataset", allow_patterns=[manifests.NAME], **options)
        manifest = manifests.load(folder)
        if not manifest.complete:
            raise DatastoreError(
                f"{source}: the datastore is unfinished ({manifest.entries:,} entries so far): run "
                "the same Datastore.build (or `knnlm build`) again to resume it"
            )
        return cls(local_folder(source, "dataset", **options), manifest)

    def __len__(self) -> int:
        return self.manifest.entries

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}: {len(self):,} entries, "
            f"layer {self.layer!r}, {self.dim} x {self.manifest.dtype})"
        )

    @property
    def dim(self) -> int:
        """D."""
        return self.manifest.dim

    @property
    def layer(self) -> str:
        """The layer that the keys were captured at."""
        return self.manifest.layer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys."""
        return DTYPES[self.manifest.dtype]

    @property
    def vocab_size(self) -> int:
        """V of the model that built the store; values are in [0, V)."""
        return self.manifest.vocab_size

    @property
    def documents(self) -> int:
        """How many corpus items the store was built from."""
        return self.manifest.documents

    @cached_property
    def digest(self) -> str:
        """Sha-256 that identifies the contents, by format version and checksums of the shards."""
        parts = [str(manifests.VERSION), str(len(self)), *(s.sha256 for s in self.manifest.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def values(self) -> Tensor:
        """(N,) int32, the token of each entry; mapped from the disk where there is one shard."""
        parts = [self._map_values(shard) for shard in self.manifest.shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def document_starts(self) -> Tensor:
        """(documents,) int64, the first entry of each; for one without entries, the next there."""
        parts = [self._map_starts(shard) for shard in self.manifest.shards]
        return torch.from_numpy(np.concatenate(parts))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the store, or None."""
        folder = self.path / "tokenizer"
        if not folder.is_dir():
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise DatastoreError(
                f"{folder}: the tokenizer cannot be loaded: {first_line(error)}"
            ) from error

    @overload
    def document(self, i: int) -> int: ...
    @overload
    def document(self, i: Tensor) -> Tensor: ...
    def document(self, i: int | Tensor) -> int | Tensor:
        """Which corpus item entry i came from; a tensor of entries gives a tensor (int64)."""
        if isinstance(i, Tensor):
            found = (
                torch.searchsorted(self.document_starts, i.to("cpu", torch.int64), right=True) - 1
            )
            return found.to(i.device)
        return int(torch.searchsorted(self.document_starts, self._entry(i), right=True)) - 1

    def context(self, i: int, before: int = 16, after: int = 8) -> list[int]:
        """Token ids around entry i's token, from the values of its document alone.

        Returns:
            values[max(start, i − before) : min(end, i + after + 1)], where the document has the
            entries [start, end). A document's first token is no value, so it is not there.

        Raises:
            DatastoreError: the store is a subsample, which lacks the entries in between.
        """
        if self.manifest.subsample is not None:
            raise DatastoreError(
                f"{self.path}: a subsample keeps single entries, not the text around them: ask the "
                "datastore it was drawn from for the context"
            )
        i = self._entry(i)
        document = self.document(i)
        start = int(self.document_starts[document])
        is_last = document + 1 == self.documents
        end = len(self) if is_last else int(self.document_starts[document + 1])
        found: list[int] = self.values[max(start, i - before) : min(end, i + after + 1)].tolist()
        return found

    def check_model(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Raise `ModelMismatchError` unless the store was built with this model (and tokenizer)."""
        identity.check_model(
            self.manifest.model, model, tokenizer,
            made=f"{self.path}: this datastore was built with",
            remedy="Load the model it was built with, build a datastore with this one",
        )  # fmt: skip

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ModelMismatchError` unless the store's text was read with this tokenizer.

        A store that was built from token ids, without a tokenizer, takes any.
        """
        identity.check_tokenizer(
            self.manifest.model, tokenizer,
            made=f"{self.path}: this datastore was built with",
            remedy="load the tokenizer it was built with (store.tokenizer)",
        )  # fmt: skip

    def verify(self, progress: bool = False) -> None:
        """Read everything and compare it with the manifest.

        Raises:
            DatastoreError: naming the first file whose checksum, values, document table or keys
                are wrong.
        """
        last_start, first = 0, 0
        shards = track(
            self.manifest.shards,
            "verifying",
            lambda shard: shard.rows,
            total=len(self),
            unit="entries",
            show=progress,
        )
        for i, shard in enumerate(shards):
            path = self.path / shard.file
            _check_file(path, shard, self.manifest)
            if file_sha256(path) != shard.sha256:
                raise DatastoreError(f"{path}: the file is damaged: its checksum is another one")
            values = self._map_values(shard)
            if not 0 <= int(values.min()) <= int(values.max()) < self.vocab_size:
                raise DatastoreError(f"{path}: a value is outside [0, {self.vocab_size})")
            is_last = i == len(self.manifest.shards) - 1
            starts = self._map_starts(shard)
            bounds = np.concatenate([[max(first, last_start)], starts, [first + shard.rows]])
            begins_late = i == 0 and (not len(starts) or starts[0] != 0)
            if begins_late or (np.diff(bounds) < 0).any():
                raise DatastoreError(f"{path}: the document table is out of order")
            if not is_last and len(starts) and starts[-1] == first + shard.rows:
                raise DatastoreError(f"{path}: the document table reaches into the next shard")
            last_start, first = int(bounds[-2]), first + shard.rows
            for block in torch.split(self._map_keys(shard), _CHECKED_ROWS):
                if not bool(block.isfinite().all()):
                    raise DatastoreError(f"{path}: a key is NaN or infinite")

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the store, its indexes and its card to a dataset repository of the Hub.

        `options` are those of `persistence.push_folder`: private, token, commit_message, …
        """
        more = options.pop("ignore_patterns", None) or []
        ignored = [".lock", "*.tmp", "*.tmp/**", *more]
        return push_folder(self.path, repo_id, "dataset", ignore_patterns=ignored, **options)

    def _entry(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"entry {i} is out of range: there are {len(self)}")
        return int(i)

    def _map(self, shard: Shard, dtype: Any, at: int, count: int) -> npt.NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype=dtype)
        offset = DATA_START + at
        # Copy-on-write: torch wants writable memory, and the file must never change.
        mapped = np.memmap(self.path / shard.file, dtype, "c", offset, (count,))
        found: npt.NDArray[Any] = mapped.view(np.ndarray)
        return found if offset % found.itemsize == 0 else found.copy()

    def _rows(self) -> Rows:
        """The keys of all shards, as one mapped array where the system can."""
        regions = [
            Region(self.path / s.file, DATA_START, s.rows * self.manifest.row_bytes)
            for s in self.manifest.shards
        ]
        flat = joined(regions, _NUMPY[self.manifest.dtype]) if len(regions) > 1 else None
        if flat is None:
            return Rows([self._map_keys(shard) for shard in self.manifest.shards])
        return Rows([torch.from_numpy(flat).view(self.dtype).view(len(self), self.dim)])

    def _map_keys(self, shard: Shard) -> Tensor:
        flat = self._map(shard, _NUMPY[self.manifest.dtype], 0, shard.rows * self.dim)
        return torch.from_numpy(flat).view(self.dtype).view(shard.rows, self.dim)

    def _map_values(self, shard: Shard) -> Tensor:
        at = shard.rows * self.manifest.row_bytes
        return torch.from_numpy(self._map(shard, np.int32, at, shard.rows))

    def _map_starts(self, shard: Shard) -> npt.NDArray[np.int64]:
        at = shard.rows * (self.manifest.row_bytes + 4)
        return self._map(shard, np.int64, at, self.manifest.document_count(shard))


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Check that every shard is there, of the size and header that the manifest implies."""
    for shard in manifest.shards:
        _check_file(folder / shard.file, shard, manifest)


def _check_file(path: Path, shard: Shard, manifest: Manifest) -> None:
    if not path.is_file():
        raise DatastoreError(f"{path}: the shard is missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DatastoreError(
            f"{path}: the shard has {size:,} bytes, expected {shard.bytes:,}: it is truncated or "
            "not of this store"
        )
    header = shard_header(manifest, shard.rows, manifest.document_count(shard))
    with path.open("rb") as file:
        if file.read(DATA_START) != header:
            raise DatastoreError(f"{path}: the shard's header does not fit the manifest")
