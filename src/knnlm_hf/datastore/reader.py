"""A finished datastore, memory-mapped."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from knnlm_hf import identity
from knnlm_hf.datastore import manifest as manifests
from knnlm_hf.datastore import removal
from knnlm_hf.datastore.manifest import DATA_START, DTYPES, Manifest
from knnlm_hf.datastore.mapping import Region, joined
from knnlm_hf.datastore.removal import Removed
from knnlm_hf.datastore.rows import Rows
from knnlm_hf.datastore.shards import NUMPY, MappedShard
from knnlm_hf.datastore.verification import verify
from knnlm_hf.errors import DatastoreError, first_line
from knnlm_hf.persistence import local_folder, push_folder
from knnlm_hf.untrusted import inside


class DatastoreReader:
    """N entries: key = hidden state before a token, (D,); value = the token.

    All of it is mapped when it is opened: what becomes of the folder later, a reader sees the
    whole state that it opened.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the shards of a complete store; use `open`."""
        self.path = path
        self.manifest = manifest
        self._shards = [MappedShard(path, shard, manifest) for shard in manifest.shards]
        self.keys = self._rows()
        self._take_away(removal.load(path, manifest))

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
        folder = local_folder(source, "dataset", **options)
        while True:
            try:
                return cls(folder, manifest)
            except DatastoreError:
                changed = manifests.load(folder)
                if changed == manifest:
                    raise
                manifest = changed  # it grew between the manifest and the shards

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

    @property
    def removed_documents(self) -> list[int]:
        """Numbers of the removed documents, ascending."""
        found: list[int] = self._removed.documents.tolist()
        return found

    @property
    def removed(self) -> Removed | None:
        """The removed entries; None where there are none."""
        return self._removed if self._removed.entries else None

    @property
    def live(self) -> int:
        """How many entries are not removed."""
        return len(self) - self._removed.entries

    def nth_live(self, ranks: Tensor) -> Tensor:
        """Numbers of live entries by their rank, 0 ≤ rank < `live`; int64, of the same shape."""
        return self._removed.nth_live(ranks)

    @property
    def digest(self) -> str:
        """Sha-256 that identifies the contents: the rows, and which of them are removed."""
        if self.removed is None:
            return self.manifest.rows_digest
        parts = [self.manifest.rows_digest, *map(str, self.removed_documents)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    @torch.inference_mode(mode=False)  # else, first asked for in that mode, it would be marked
    def values(self) -> Tensor:
        """(N,) int32, the token of each entry; mapped from the disk where there is one shard."""
        parts = [shard.values for shard in self._shards]
        if len(parts) == 1:
            return parts[0]
        # By numpy, which asks for huge pages: a search looks values up in random order.
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))

    @cached_property
    @torch.inference_mode(mode=False)
    def document_starts(self) -> Tensor:
        """(documents,) int64, the first entry of each; for one without entries, the next there."""
        starts = np.concatenate([shard.document_starts for shard in self._shards])
        bounds = np.concatenate([[0], starts, [len(self)]])
        if (np.diff(bounds) < 0).any():
            raise DatastoreError(f"{self.path}: the document table is out of order: it is damaged")
        return torch.from_numpy(starts)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the store, or None."""
        folder = self.path / "tokenizer"
        if not folder.is_dir():
            return None
        from transformers import AutoTokenizer

        for file in folder.rglob("*"):
            if file.is_symlink() or not file.is_dir():
                inside(folder, str(file.relative_to(folder)), DatastoreError)
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
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
            DatastoreError: the document is removed, or the store is a subsample, which lacks the
                entries in between.
        """
        if self.manifest.subsample is not None:
            raise DatastoreError(
                f"{self.path}: a subsample keeps single entries, not the text around them: ask the "
                "datastore it was drawn from for the context"
            )
        i = self._entry(i)
        document = self.document(i)
        if self.removed is not None and bool(self.removed.covers(torch.tensor(i))):
            raise DatastoreError(f"{self.path}: document {document} of entry {i} is removed")
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
        verify(self, progress)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the store, its indexes and its card to a dataset repository of the Hub.

        `options` are those of `persistence.push_folder`: private, token, commit_message, …

        Raises:
            DatastoreError: documents are removed, whose text the files still hold.
        """
        if self.removed is not None:
            raise DatastoreError(
                f"{self.path}: {len(self.removed_documents)} removed documents are still in its "
                "files, and would be uploaded: push what store.compact(path) writes"
            )
        more = options.pop("ignore_patterns", None) or []
        ignored = [".lock", "*.tmp", "*.tmp/**", ".append/**", *more]
        return push_folder(self.path, repo_id, "dataset", ignore_patterns=ignored, **options)

    def _entry(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"entry {i} is out of range: there are {len(self)}")
        return int(i)

    def _take_away(self, documents: list[int]) -> None:
        """Have the entries of these documents be removed, and of no others."""
        starts = self.document_starts if documents else torch.zeros(1, dtype=torch.int64)
        self._removed = Removed(torch.tensor(documents, dtype=torch.int64), starts, len(self))

    def _rows(self) -> Rows:
        """The keys of all shards, as one mapped array where the system can."""
        regions = [
            Region(self.path / s.file, DATA_START, s.rows * self.manifest.row_bytes)
            for s in self.manifest.shards
        ]
        flat = joined(regions, NUMPY[self.manifest.dtype])
        if flat is None:
            return Rows([shard.keys for shard in self._shards])
        return Rows([torch.from_numpy(flat).view(self.dtype).view(len(self), self.dim)])
