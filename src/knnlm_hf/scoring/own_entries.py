"""Which entries a corpus's own tokens are, where the corpus is the one in the datastore."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory.evidence import searches
from knnlm_hf.memory.text import reads


class OwnEntries:
    """Entry numbers of a corpus, token by token: entry i is the i-th token predicted.

    That holds for a store's own corpus, read in its order from its beginning, and for no other:
    every token is compared with the entry's value.

    Raises:
        KNNLMError: no memory searches, or a store is a subsample, whose entries have gaps.
    """

    def __init__(self, memories: Iterable[Any]) -> None:
        searching = [memory for memory in memories if has_entries(memory)]
        if not searching:
            raise KNNLMError("exclude_self needs a model with a datastore, found none")
        stores = [getattr(memory, "store", None) for memory in searching]
        self.stores = [store for store in stores if isinstance(store, DatastoreReader)]
        for store in self.stores:
            if store.manifest.subsample is not None:
                raise KNNLMError(
                    f"exclude_self: {store.path} is a subsample, whose entries do not follow the "
                    "corpus token by token: use the datastore that it was drawn from"
                )
        self.next_entry = 0

    def take(self, tokens_N: Tensor, documents_N: Tensor) -> Tensor:
        """(N,) entry numbers of the next N tokens, which stand in these documents.

        Raises:
            KNNLMError: an entry carries another token, or there is none.
        """
        first = self.next_entry
        self.next_entry += len(tokens_N)
        for store in self.stores:
            values_n = store.values[first : self.next_entry]
            differs_n = values_n != tokens_N[: len(values_n)]
            same = int(differs_n.nonzero()[0]) if bool(differs_n.any()) else len(values_n)
            if same < len(tokens_N):
                at = f"token {int(tokens_N[same])} (document {int(documents_N[same])})"
                raise KNNLMError(_another(store, first + same, at))
        return torch.arange(first, self.next_entry)


def has_entries(memory: Any) -> bool:
    """Whether the memory searches entries other than those of the text that is read."""
    return searches(memory) and (hasattr(memory, "store") or not reads(memory))


def _another(store: DatastoreReader, entry: int, at: str) -> str:
    if entry < len(store):
        found = f"entry {entry} carries token {int(store.values[entry])}, but the corpus has {at}"
    else:
        found = f"the corpus has {at} after the last of the {len(store):,} entries"
    removed = "" if store.removed is None else ", the removed ones too"
    return (
        f"exclude_self: {store.path}: {found}: score the corpus that the store was built from, "
        f"whole documents from its beginning{removed}, with bos={store.manifest.bos}"
    )
