"""What a build reads of its corpus: each shard's values and document starts, and a running hash."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from knnlm_hf.datastore.manifest import Manifest
from knnlm_hf.datastore.writer import ShardText
from knnlm_hf.errors import DatastoreError
from knnlm_hf.windows import Document, Tokens


class Ledger:
    """Follows a stream of documents and hands over each shard's text when it is complete.

    The values of a document are all its tokens but the first. A shard's text is complete when the
    first value of the next one is read, or at `finish`: documents without entries that follow the
    last entry belong to the last shard.
    """

    def __init__(self, shard_size: int, emit: Callable[[int, ShardText], None]) -> None:
        """`emit(number of the shard, its text)` is called in order."""
        self._shard_size, self._emit = shard_size, emit
        self.entries = 0
        self.documents = 0
        self._shards = 0
        self._values: list[Tokens] = []
        self._held = 0  # entries of the shard in progress
        self._starts = array("q")
        self._digest = hashlib.sha256()
        self._full_digest = ""  # what the digest was when the shard in progress became full

    def read(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass the documents on, taking note of each."""
        at_start, first_seen = True, False
        for piece in documents:
            if at_start:
                self._starts.append(self.entries)
                self.documents += 1
                self._digest.update(b"document at %d\n" % self.entries)
                first_seen = False
            values = piece.tokens
            if len(values) and not first_seen:
                self._digest.update(values[:1].tobytes())
                values, first_seen = values[1:], True
            self._take(values)
            at_start = not piece.more
            yield piece

    def finish(self) -> None:
        """Hand over the last shard's text, with all documents not handed over yet."""
        if self._held:
            self._hand_over(len(self._starts), self._digest.hexdigest())

    def _take(self, values: Tokens) -> None:
        while len(values):
            if self._held == self._shard_size:
                self._hand_over(bisect_left(self._starts, self.entries), self._full_digest)
            part = values[: self._shard_size - self._held]
            self._digest.update(part.tobytes())
            self._values.append(part)
            self._held += len(part)
            self.entries += len(part)
            values = values[len(part) :]
            if self._held == self._shard_size:
                self._full_digest = self._digest.hexdigest()

    def _hand_over(self, starts: int, corpus: str) -> None:
        text = ShardText(
            np.concatenate(self._values), np.array(self._starts[:starts], dtype=np.int64), corpus
        )
        self._starts = self._starts[starts:]
        self._values, self._held = [], 0
        self._shards += 1
        self._emit(self._shards - 1, text)


class CorpusCheck:
    """Compares the texts of a corpus read again with the finished shards of a store."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._documents = 0

    def __call__(self, index: int, text: ShardText) -> None:
        """Raise `DatastoreError` unless `text` is that of shard number `index`."""
        shards = self._manifest.shards
        first = index * self._manifest.shard_size
        if index >= len(shards):
            raise self._error(f"it goes on after {first:,} entries, where the store ends")
        if text.corpus != shards[index].corpus:
            raise self._error(self._where(index, first, text))
        self._documents += len(text.document_starts)

    def _where(self, index: int, first: int, text: ShardText) -> str:
        with safe_open(self._folder / self._manifest.shards[index].file, "np") as file:
            values, starts = file.get_tensor("values"), file.get_tensor("document_starts")
        n = min(len(values), len(text.values))
        changed = np.flatnonzero(values[:n] != text.values[:n])
        if len(changed):
            at = int(changed[0])
            document = self._documents - 1 + int(np.searchsorted(starts, first + at, "right"))
            tokens = f"token {values[at]}, now {text.values[at]}"
            return f"at entry {first + at:,} (document {document}) the store has {tokens}"
        if len(text.values) < len(values):
            return f"it ends after {first + n:,} entries, the store does not"
        if len(text.values) > len(values):
            return f"it goes on after {first + n:,} entries, where the store ends"
        if not np.array_equal(starts, text.document_starts):
            return f"its documents are divided otherwise in entries {first:,} to {first + n:,}"
        last = max(self._documents, self._documents + len(starts) - 1)
        return f"a first token differs in documents {self._documents} to {last}"

    def _error(self, where: str) -> DatastoreError:
        return DatastoreError(
            f"{self._folder}: the corpus is not the one that the store was built from: {where}. "
            "Give the same corpus, or build into another folder"
        )
