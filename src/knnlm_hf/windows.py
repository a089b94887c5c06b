"""Token windows: every token of a document but its first is predicted exactly once.

A window holds `window` input tokens and predicts the token after each. Windows of one document
start at 0, stride, 2·stride, …; what an earlier window already predicted is input only. So the
first window's predictions see all of the document before them, and every later prediction sees at
least `window − stride` tokens before its own input token.

Everything here is pure and streams: a document may come in pieces, and no more than one piece and
one window of it is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_hf.errors import SettingError

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """A corpus item as tokens, or one piece of it where it is long."""

    number: int
    """Position of the item in the corpus, from 0."""
    tokens: Tokens
    """(n,) int32."""
    words: int | None = None
    """Whitespace-separated words that begin in this piece, where the item was text."""
    more: bool = False
    """Whether the next item of the stream continues this document."""


@dataclass(frozen=True)
class Window:
    """A run of inputs of one document and the token after each."""

    document: int
    start: int
    """Position in the document of the first input."""
    tokens: Tokens
    """(T,) input tokens, T ≤ window."""
    targets: Tokens
    """(T,) the token after each input."""
    new: int
    """How many predictions, counted from the end, no earlier window made; 1 ≤ new ≤ T."""


@dataclass(frozen=True)
class Batch:
    """Windows as rows, padded on the right; the new predictions, read row by row, in order."""

    input_ids: Tensor
    """(B, T) int64, 0 where padded."""
    targets: Tensor
    """(B, T) int64, the token after each input, 0 where padded."""
    is_new: Tensor
    """(B, T) bool: predictions to score or store. Never a padded position."""
    lengths: Tensor
    """(B,) int64, tokens of each row before its padding."""
    documents: Tensor
    """(B,) int64, document number of each row."""
    starts: Tensor
    """(B,) int64, position in its document of each row's first input; 0 for a first window."""

    @property
    def new(self) -> int:
        """How many predictions of the batch are new."""
        return int(np.count_nonzero(self.is_new.numpy()))

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T) int64, 1 where there is a token; None where no row is padded."""
        width = self.input_ids.shape[1]
        if bool((self.lengths == width).all()):
            return None
        return (torch.arange(width) < self.lengths[:, None]).long()


def windows(tokens: Any, document: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of one whole document: (n,) tokens give n − 1 predictions, each new once."""
    whole = Document(document, np.asarray(tokens, dtype=np.int32))
    return stream([whole], window, stride)


def stream(documents: Iterable[Document], window: int, stride: int) -> Iterator[Window]:
    """The windows of a stream of documents, each whole or in consecutive pieces.

    Args:
        documents: in corpus order; a piece with `more` is followed by the next of its document.
        window: inputs per window, 1 or more.
        stride: new predictions per window after a document's first, 1 ≤ stride ≤ window.
    """
    held = np.empty(0, dtype=np.int32)  # the document's tokens from `start` on
    start = predicted = 0
    for piece in documents:
        held = np.concatenate([held, piece.tokens]) if len(held) else piece.tokens
        while len(held) > window:  # a full window, whatever follows
            new = start + window - predicted
            yield Window(piece.number, start, held[:window], held[1 : window + 1], new)
            predicted = start + window
            held, start = held[stride:], start + stride
        if piece.more:
            continue
        new = start + len(held) - 1 - predicted
        if new > 0:  # the document's end fills no window
            yield Window(piece.number, start, held[:-1], held[1:], new)
        held, start, predicted = held[:0], 0, 0


def batches(
    documents: Iterable[Document], window: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Group the windows of a stream by `batch_size`, in order; the last group may be smaller."""
    return batched(stream(documents, window, stride), batch_size)


def batched(chosen: Iterable[Window], batch_size: int) -> Iterator[Batch]:
    """Group any windows by `batch_size`, in order; the last group may be smaller."""
    rows: list[Window] = []
    for row in chosen:
        rows.append(row)
        if len(rows) == batch_size:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[Window]) -> Batch:
    lengths_B = np.array([len(row.tokens) for row in rows])
    shape = (len(rows), int(lengths_B.max()))
    input_ids_BT = np.zeros(shape, dtype=np.int64)
    targets_BT = np.zeros(shape, dtype=np.int64)
    is_new_BT = np.zeros(shape, dtype=bool)
    for b, row in enumerate(rows):
        length = len(row.tokens)
        input_ids_BT[b, :length] = row.tokens
        targets_BT[b, :length] = row.targets
        is_new_BT[b, length - row.new : length] = True
    return Batch(
        input_ids=torch.from_numpy(input_ids_BT),
        targets=torch.from_numpy(targets_BT),
        is_new=torch.from_numpy(is_new_BT),
        lengths=torch.from_numpy(lengths_B),
        documents=torch.tensor([row.document for row in rows]),
        starts=torch.tensor([row.start for row in rows]),
    )


_LENGTH_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_target_positions",
    "context_length",
    "n_ctx",
)
_NO_LENGTH = 1024


def _longest_context(config: Any) -> int | None:
    """The model's longest input in tokens, or None where its config sets no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in _LENGTH_FIELDS:
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            # RoBERTa and its kin count positions from pad_token_id + 1, in a table of this length.
            is_roberta = "roberta" in config.model_type or config.model_type == "camembert"
            reserved = (config.pad_token_id or 0) + 1 if is_roberta else 0
            return length - reserved
    return None


def default_window(config: Any) -> int:
    """The model's longest context in tokens; 1024 where its config sets no limit (Mamba, Bloom)."""
    return _longest_context(config) or _NO_LENGTH


def check_window(window: int | None, stride: int | None, config: Any) -> tuple[int, int]:
    """Return (window, stride), with None replaced: the longest context, and half the window.

    Raises:
        SettingError: not 1 ≤ stride ≤ window ≤ the model's longest context, or no whole numbers.
    """
    longest = _longest_context(config)
    if window is None:
        window = default_window(config)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SettingError(f"window is {window!r}, expected a whole number of tokens, 1 or more")
    if longest is not None and window > longest:
        raise SettingError(f"window is {window}, but the model takes {longest} tokens at most")
    if stride is None:
        stride = max(1, window // 2)
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= window:
        raise SettingError(f"stride is {stride!r}, expected a whole number, 1 to window ({window})")
    return window, stride
