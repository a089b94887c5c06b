"""The table of the neighbours' texts: an entry that many tokens found stands there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knnlm_hf.errors import DatastoreError
from knnlm_hf.inspection.pieces import around
from knnlm_hf.modeling.explain import Neighbour, origin

_BEFORE, _AFTER = 14, 7  # tokens


@dataclass(frozen=True)
class Context:
    """An entry of a datastore, or of the text itself, in its text."""

    memory: int
    document: int | None
    token: int
    """Its id."""
    text: tuple[str, str, str] | None
    """Before, of and after the token; None in a subsample, which has no text."""


class Contexts:
    """The contexts of entries, numbered in the order in which they are first asked for."""

    def __init__(self, memories: Sequence[Any], ids: list[int], tokenizer: Any) -> None:
        self._memories, self._ids, self._tokenizer = memories, ids, tokenizer
        self._numbers: dict[tuple[int, int], int] = {}
        self.rows: list[Context] = []

    def number(self, of: Neighbour) -> int:
        """Which row of the table has the context of a neighbour."""
        key = of.memory, of.entry
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append(Context(of.memory, of.document, of.token, self._text(of)))
        return self._numbers[key]

    def __getitem__(self, of: Neighbour) -> Context:
        return self.rows[self.number(of)]

    def _text(self, of: Neighbour) -> tuple[str, str, str] | None:
        store = origin(self._memories[of.memory], self._ids)
        try:
            ids = store.context(of.entry, _BEFORE, _AFTER)
        except DatastoreError:
            return None
        start = 0 if of.document is None else int(store.document_starts[of.document])
        in_document = of.entry - start
        return around(ids, min(_BEFORE, in_document), self._tokenizer)
