"""A corpus in any of its forms → a stream of documents as tokens.

    str or Path                     the path of a text file: one document
    list[str]                       texts
    list[list[int]]                 tokens (tensors and arrays too)
    Dataset, IterableDataset, dict  its "input_ids" column, else its "text" column
    any iterable of those items     one pass; items may also be dicts with either of those names

One item is one document; an item of 0 or 1 tokens keeps its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnlm_hf.errors import CorpusError
from knnlm_hf.texts import TextTokenizer
from knnlm_hf.windows import Document, Tokens

_COLUMNS = ("input_ids", "text")
_LONG_TEXT = 1 << 17  # characters from which a text is tokenised in pieces
_BATCH_TEXTS, _BATCH_CHARACTERS = 256, 1 << 18  # short texts tokenised together
_FORMS = (
    "expected the path of a text file, a list of texts or of token lists, or a dataset with a "
    "'text' or 'input_ids' column"
)


class Documents:
    """A corpus as a stream of documents, counting as it goes; made by `documents`."""

    def __init__(
        self, corpus: Any, tokenizer: Any, vocab_size: int | None, bos_id: int | None
    ) -> None:
        self._corpus, self._tokenizer = corpus, tokenizer
        self._vocab_size, self._bos_id = vocab_size, bos_id
        self.words: int | None = 0
        """Whitespace-separated words read so far; None once an item was no text."""

    def __iter__(self) -> Iterator[Document]:
        self.words = 0
        largest = length = 0
        at_start = True
        for piece in _pieces(self._corpus, self._tokenizer):
            self._count_words(piece)
            if at_start and not len(piece.tokens) and piece.more:
                continue  # nothing of the document yet
            if self._vocab_size is not None:
                _check_range(piece, self._vocab_size)
            if at_start and self._bos_id is not None:
                piece = _with_bos(piece, self._bos_id)
            length += len(piece.tokens)
            largest = max(largest, length)
            at_start = not piece.more
            length = 0 if at_start else length
            yield piece
        if largest < 2:
            raise CorpusError(
                f"no document of the corpus has 2 tokens (the longest has {largest}): "
                "nothing can be predicted"
            )

    def _count_words(self, piece: Document) -> None:
        if self.words is not None:
            self.words = None if piece.words is None else self.words + piece.words


def documents(
    corpus: Any,
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    bos: bool | None = None,
    config: Any = None,
) -> Documents:
    """The documents of a corpus in order, long ones in pieces (`Document.more`).

    Args:
        corpus: any form listed above.
        tokenizer: a Hugging Face tokeniser; needed where items are text. A document's ids are
            those of `tokenizer(text).input_ids`, whatever its length.
        vocab_size: token ids must lie in [0, vocab_size).
        bos: True puts the tokenizer's BOS, else the config's, before each document that does not
            begin with it; otherwise documents begin as the tokenizer has it.
        config: the model's, for `bos`.

    Raises:
        CorpusError: now, a BOS that neither has; while iterating, a missing or empty file, a wrong
            form, ids out of range, text without a tokenizer, or, at the end, no document of at
            least 2 tokens.
    """
    return Documents(corpus, tokenizer, vocab_size, _bos_id(tokenizer, config) if bos else None)


def _bos_id(tokenizer: Any, config: Any) -> int:
    for owner in (tokenizer, config):
        token_id = getattr(owner, "bos_token_id", None)
        if isinstance(token_id, int):
            return token_id
    raise CorpusError("bos=True, but neither the tokenizer nor the model's config has a BOS token")


def _with_bos(piece: Document, bos_id: int) -> Document:
    if len(piece.tokens) and piece.tokens[0] == bos_id:
        return piece
    return replace(piece, tokens=np.append(np.int32(bos_id), piece.tokens))


def _check_range(piece: Document, vocab_size: int) -> None:
    tokens = piece.tokens
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise CorpusError(
            f"document {piece.number} has token id {wrong}, outside the model's vocabulary "
            f"[0, {vocab_size}): was it tokenised for another model?"
        )


def _pieces(corpus: Any, tokenizer: Any) -> Iterator[Document]:
    texts = None if tokenizer is None else TextTokenizer(tokenizer)
    if isinstance(corpus, str | PathLike):
        return _file(Path(corpus).expanduser(), texts)
    return _items(_iterable(corpus), texts)


def _need(texts: TextTokenizer | None, number: int) -> TextTokenizer:
    if texts is None:
        raise CorpusError(f"document {number} is text: pass the tokenizer to read it with")
    return texts


def _file(path: Path, texts: TextTokenizer | None) -> Iterator[Document]:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise CorpusError(
            f"{str(path)[:200]}: {found}; a corpus given as a string is the path of a text file "
            "(for a text itself, put it in a list)"
        )
    try:
        with path.open(encoding="utf-8") as file:
            if not file.read(1):
                raise CorpusError(f"{path}: the file is empty")
            file.seek(0)
            for tokens, words in _need(texts, 0).pieces(file):
                yield Document(0, tokens, words, more=True)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not a UTF-8 text file ({error.reason})") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from error
    yield Document(0, np.empty(0, dtype=np.int32), 0)


def _iterable(corpus: Any) -> Iterator[Any]:
    """The items of a corpus that is no file."""
    if isinstance(corpus, bytes):
        raise CorpusError(f"the corpus is bytes, {_FORMS}")
    names = getattr(corpus, "column_names", None)  # of a Dataset or IterableDataset
    if isinstance(names, list):
        column = _column(names)
        chunks = corpus.select_columns([column]).iter(batch_size=256)
        return (item for chunk in chunks for item in chunk[column])
    if isinstance(corpus, Mapping):
        if any(hasattr(value, "select_columns") for value in corpus.values()):
            splits = ", ".join(map(repr, corpus))
            raise CorpusError(f"the corpus is a dict of datasets: choose one of {splits}")
        return _iterable(corpus[_column(list(corpus))])
    if not isinstance(corpus, Iterable):
        raise CorpusError(f"the corpus is of type {type(corpus).__name__}, {_FORMS}")
    return iter(corpus)


def _column(names: Iterable[str]) -> str:
    for column in _COLUMNS:
        if column in names:
            return column
    found = ", ".join(map(repr, names)) or "none"
    raise CorpusError(f"the dataset has no column 'text' or 'input_ids' (its columns: {found})")


def _items(items: Iterable[Any], texts: TextTokenizer | None) -> Iterator[Document]:
    short: list[str] = []  # texts waiting to be tokenised together
    first = characters = 0
    number = -1
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            item = item[_column(list(item))]
        if isinstance(item, str) and len(item) < _LONG_TEXT:
            first = first if short else number
            short.append(item)
            characters += len(item)
            if len(short) < _BATCH_TEXTS and characters < _BATCH_CHARACTERS:
                continue
            item = None
        if short:
            yield from _short(short, first, _need(texts, first))
            short, characters = [], 0
        if isinstance(item, str):
            for tokens, words in _need(texts, number).pieces(item):
                yield Document(number, tokens, words, more=True)
            yield Document(number, np.empty(0, dtype=np.int32), 0)
        elif item is not None:
            yield Document(number, _tokens(item, number))
    if short:
        yield from _short(short, first, _need(texts, first))
    if number < 0:
        raise CorpusError("the corpus is empty: it has no documents")


def _short(texts: list[str], first: int, tokenizer: TextTokenizer) -> Iterator[Document]:
    rows = tokenizer.encode_all(texts)
    for number, (text, tokens) in enumerate(zip(texts, rows, strict=True), start=first):
        yield Document(number, tokens, len(text.split()))


def _tokens(item: Any, number: int) -> Tokens:
    """(n,) int32 of one item that is a sequence of token ids."""
    try:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().numpy()
        tokens = np.asarray(item)
        if tokens.ndim == 1 and not len(tokens):
            return np.empty(0, dtype=np.int32)
    except (TypeError, ValueError):  # ragged, or not numbers
        tokens = np.empty((), dtype=object)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        hint = ": put the ids of one document in a list" if tokens.ndim == 0 else ""
        raise CorpusError(
            f"document {number} is {type(item).__name__} of {tokens.ndim} dimension(s) and type "
            f"{tokens.dtype}, expected a text or a flat list of token ids{hint}"
        )
    if tokens.min() < -(2**31) or tokens.max() >= 2**31:
        raise CorpusError(f"document {number} has a token id beyond 32 bits")
    return tokens.astype(np.int32, copy=False)
