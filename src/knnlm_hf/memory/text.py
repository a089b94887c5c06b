"""Texts as far as they were read: the states in them, and the token after each.

Most memories are asked of states alone. One that has `reading` is shown the text they stand in
first, to learn its entries from it (`CacheMemory`) or to compare it with theirs (`HybridMemory`):

    memory.reading(text, rows, places).log_probs(hidden)

Shape suffixes: B text, S place in a text, Q query, N entry, D hidden dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Rows of text as far as they were read. An entry is a state and the token after it."""

    keys: Tensor
    """(B, S, D) states, of any float dtype."""
    values: Tensor
    """(B, S) the token after each state; negative where there is none to be found."""
    parts: Tensor
    """(B, S) integers: what has another one is another text in the same row."""
    first: int = 0
    """How many entries before these are gone."""


def reads(memory: Any) -> bool:
    """Whether a memory is to be shown the text before it is asked."""
    return hasattr(memory, "reading")


class Reader:
    """Lets a memory read a corpus, which comes in order and in pieces.

    What a piece's queries may find is what stands before them in their own document, in this piece
    or in earlier ones; the last `memory.size` entries of the last document are kept.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self._text: Text | None = None

    def read(self, hidden_ND: Tensor, tokens_N: Tensor, documents_N: Tensor) -> Any:
        """The memory to be asked of these states; any that does not read as it is.

        Args:
            hidden_ND: the next states of the corpus.
            tokens_N: the token after each.
            documents_N: which document each stands in.
        """
        if not reads(self.memory):
            return self.memory
        columns = [one.to(hidden_ND.device) for one in (hidden_ND, tokens_N, documents_N)]
        before, first = 0, 0
        if self._text is not None:
            before, first = self._text.keys.shape[1], self._text.first
            kept = [column[0].to(hidden_ND.device) for column in self._text[:3]]
            columns = [torch.cat(pair) for pair in zip(kept, columns, strict=True)]
        keys_SD, values_S, parts_S = columns
        text = Text(keys_SD[None], values_S[None], parts_S[None], first)
        places_N = torch.arange(before, len(values_S), device=hidden_ND.device)
        # Of no use any more: other documents, and what is too far back.
        gone = int((parts_S != parts_S[-1]).sum()) if len(parts_S) else 0
        gone = max(gone, len(values_S) - self.memory.size)
        kept = [column[:, gone:].clone() for column in text[:3]]
        self._text = Text(kept[0], kept[1], kept[2], first + gone)
        return self.memory.reading(text, torch.zeros_like(places_N), places_N)
