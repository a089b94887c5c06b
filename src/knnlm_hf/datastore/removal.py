"""Documents taken out of a store: tombstones that every search, sample and training honours.

A side file names the removed documents; the manifest names the side file by its checksum, and is
replaced last. Entry and document numbers stay as they are, and so do the rows, until `compact`
writes a store without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.manifest import Manifest, Removal
from knnlm_hf.errors import DatastoreError, SettingError
from knnlm_hf.untrusted import inside

FORMAT = "knnlm_hf removed documents"


class Removed:
    """The entries of removed documents, as ranges of entry numbers.

    Args:
        documents: (m,) int64, the removed ones, ascending.
        document_starts: (documents,) int64, first entry of every document.
        entries: N of the store.
    """

    def __init__(self, documents: Tensor, document_starts: Tensor, entries: int) -> None:
        self.documents = documents
        ends = torch.cat([document_starts[1:], torch.tensor([entries])])
        starts_M, ends_M = document_starts[documents], ends[documents]
        filled = starts_M < ends_M  # a document may have no entries
        self._starts_M, self._ends_M = starts_M[filled], ends_M[filled]
        self._before_M = (self._ends_M - self._starts_M).cumsum(0)
        self.entries = int(self._before_M[-1]) if len(self._before_M) else 0
        """How many entries are removed."""

    def covers(self, ids: Tensor) -> Tensor:
        """Which of the entry numbers are removed: bool, of the same shape and device."""
        if self.entries == 0:
            return torch.zeros_like(ids, dtype=torch.bool)
        starts_M, ends_M = self._starts_M.to(ids.device), self._ends_M.to(ids.device)
        at = torch.searchsorted(starts_M, ids, right=True) - 1
        return (at >= 0) & (ids < ends_M[at.clamp(min=0)])

    def nth_live(self, ranks: Tensor) -> Tensor:
        """Entry numbers of the live entries of these ranks: 0 is the first that is not removed."""
        # The live rank of a range's start is the number of live entries before it.
        ranks_M = self._ends_M - self._before_M
        skipped = torch.cat([torch.zeros(1, dtype=torch.int64), self._before_M])
        return ranks + skipped[torch.searchsorted(ranks_M, ranks, right=True)]


def checked(documents: Any, count: int) -> list[int]:
    """Document numbers in ascending order, each once, out of `count` documents.

    Raises:
        SettingError: none, or one that is no document's number.
    """
    if isinstance(documents, Tensor):
        documents = documents.reshape(-1).tolist()
    if not isinstance(documents, Iterable) or isinstance(documents, str | bytes):
        documents = [documents]
    found = set()
    for document in documents:
        number = document.item() if hasattr(document, "item") else document
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise SettingError(
                f"document {document!r} is not in the store: expected numbers from 0 to {count - 1}"
            )
        found.add(number)
    if not found:
        raise SettingError("no document to remove: name at least one by its number")
    return sorted(found)


def load(folder: Path, manifest: Manifest) -> list[int]:
    """The removed documents of a store, ascending; none where there is no side file.

    Raises:
        DatastoreError: the side file is missing, damaged, or not what the manifest says.
    """
    if manifest.removed is None:
        return []
    path = inside(folder, manifest.removed.file, DatastoreError)
    if path.stat().st_size != manifest.removed.bytes:
        raise DatastoreError(f"{path}: expected {manifest.removed.bytes:,} bytes: it is damaged")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.removed.sha256:
        raise DatastoreError(f"{path}: the file is damaged: its checksum is another one")
    try:
        stored = json.loads(data)
        if stored["format"] != FORMAT:
            raise ValueError(f"format is {stored['format']!r}")
        found = checked(stored["documents"], manifest.documents)
        if found != stored["documents"] or len(found) != manifest.removed.documents:
            raise ValueError("the documents are not in order, or not as many as the manifest says")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatastoreError(f"{path}: not a list of removed documents ({error})") from error
    return found


def write(folder: Path, manifest: Manifest, documents: list[int]) -> Manifest:
    """Write the side file, then the manifest that names it, then delete the earlier one."""
    data = (json.dumps({"format": FORMAT, "documents": documents}) + "\n").encode()
    removal = Removal(len(data), hashlib.sha256(data).hexdigest(), len(documents))
    atomic.write_bytes(folder / removal.file, data)
    changed = replace(manifest, removed=removal)
    changed.save(folder)
    if manifest.removed is not None and manifest.removed.file != removal.file:
        atomic.remove(folder / manifest.removed.file)
    return changed
