"""Text → tokens, a bounded piece at a time, with exactly the ids of tokenising it whole.

A long text is cut into overlapping slices, each tokenised on its own. Tokenisers look only so far
around them, so two neighbouring slices agree on the middle of their overlap, id by id and offset
by offset; there the one is continued by the other. Where they do not agree (a run of spaces longer
than the overlap, say) the slices are joined and tokenised as one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from knnlm_hf.errors import CorpusError
from knnlm_hf.windows import Tokens

Rows = npt.NDArray[np.int64]
"""(n, 3): id, and start and end in the whole text, of each token."""

_SLICE = 1 << 16  # characters tokenised at once
_OVERLAP = 1 << 11
_AGREE = 12  # tokens on either side of a cut that must be the same in both slices


class TextTokenizer:
    """A Hugging Face tokeniser asked for ids only: no truncation, padding or length warning."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _private_backend(tokenizer)

    def encode_all(self, texts: Sequence[str]) -> list[Tokens]:
        """`tokenizer(text).input_ids` of every text."""
        if self._backend is None:
            rows = [self._tokenizer(text, verbose=False)["input_ids"] for text in texts]
        else:
            rows = [e.ids for e in self._backend.encode_batch_fast(list(texts))]
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def pieces(self, text: str | TextIO) -> Iterator[tuple[Tokens, int]]:
        """`tokenizer(whole).input_ids` in consecutive pieces, with the words that begin in each.

        A tokeniser without a Rust backend gives no offsets: the text is then tokenised whole.
        """
        file = io.StringIO(text) if isinstance(text, str) else text
        if self._backend is None:
            whole = file.read()
            yield self.encode_all([whole])[0], len(whole.split())
            return
        prefix, suffix = self._special_tokens()
        yield prefix, 0
        yield from _Slices(self._backend, file).pieces()
        yield suffix, 0

    def _special_tokens(self) -> tuple[Tokens, Tokens]:
        """What the tokeniser puts before and after every text."""
        assert self._backend is not None
        encoding = self._backend.encode("a")
        special = encoding.special_tokens_mask
        body = [i for i, is_special in enumerate(special) if not is_special]
        first, last = (body[0], body[-1] + 1) if body else (len(special), len(special))
        ids = np.asarray(encoding.ids, dtype=np.int32)
        return ids[:first], ids[last:]


def _private_backend(tokenizer: Any) -> Any:
    """A copy of the Rust tokeniser without truncation or padding, or None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        return None
    try:
        copy = type(backend).from_str(backend.to_str())
    except Exception:  # a part written in Python cannot be copied
        return None
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return copy


class _Slices:
    """The overlapping slices of one text, joined where neighbours agree."""

    def __init__(self, backend: Any, file: TextIO) -> None:
        self._backend = backend
        self._file = file

    def pieces(self) -> Iterator[tuple[Tokens, int]]:
        """Tokens without special ones, and the words that begin in each piece."""
        left, left_at = self._file.read(_SLICE), 0
        rows = self._encode(left, left_at)
        taken = 0  # tokens of `rows` already given out
        in_word = False
        fresh = left  # text not yet counted
        size = _SLICE
        while True:
            words, in_word = _count_words(fresh, in_word)
            fresh = self._file.read(size)
            if not fresh:
                yield _ids(rows[taken:]), words
                return
            overlap = left[-_OVERLAP:]
            right, right_at = overlap + fresh, left_at + len(left) - len(overlap)
            right_rows = self._encode(right, right_at)
            cut = _agreement(rows, right_rows, right_at, left_at + len(left))
            if cut is None or cut[0] < taken:  # no common ground: tokenise both as one
                left += fresh
                size = len(left)  # doubling, so that a text without common ground stays linear
                given, rows = rows[:taken], self._encode(left, left_at)
                if not np.array_equal(rows[:taken], given):
                    raise CorpusError(
                        "this tokenizer looks too far ahead for a text to be tokenised in pieces: "
                        "pass the corpus as token ids"
                    )
                yield _ids(rows[:0]), words
                continue
            yield _ids(rows[taken : cut[0]]), words
            left, left_at, rows, taken, size = right, right_at, right_rows, cut[1], _SLICE

    def _encode(self, text: str, at: int) -> Rows:
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return np.empty((0, 3), dtype=np.int64)
        offsets = np.asarray(encoding.offsets, dtype=np.int64) + at
        return np.column_stack([np.asarray(encoding.ids, dtype=np.int64), offsets])


def _ids(rows: Rows) -> Tokens:
    return rows[:, 0].astype(np.int32)


def _agreement(
    left: Rows, right: Rows, overlap_start: int, overlap_end: int
) -> tuple[int, int] | None:
    """Where `right` may take over from `left`: (tokens of left to keep, tokens of right to drop).

    Tried from the middle of the overlap outwards; None where no cut has `_AGREE` equal tokens
    (id, start, end) on either side.
    """
    middle = (overlap_start + overlap_end) // 2
    for step in range(0, _OVERLAP // 2, 64):
        for point in {middle - step, middle + step}:
            i = int(np.searchsorted(left[:, 1], point))
            j = int(np.searchsorted(right[:, 1], point))
            if min(i, j, len(left) - i, len(right) - j) < _AGREE:
                continue
            if np.array_equal(left[i - _AGREE : i + _AGREE], right[j - _AGREE : j + _AGREE]):
                return i, j
    return None


def _count_words(text: str, in_word: bool) -> tuple[int, bool]:
    """Words that begin in `text`, if it continues one or not; and whether it ends in one."""
    if not text:
        return 0, in_word
    words = len(text.split())
    return words - (in_word and not text[0].isspace()), not text[-1].isspace()
