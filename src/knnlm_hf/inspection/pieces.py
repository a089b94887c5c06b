"""Decoded text, cut at its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder makes of a character whose bytes are not all there
_LONGEST = 4  # bytes of a character, hence tokens that it can take
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"}
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = _CONTROLS | {0x7F: "␡"} | {code: f"⟨U+{code:04X}⟩" for code in _DIRECTIONS}


def shown(text: str) -> str:
    """A text whose control characters are seen: ␀ for one, and what turns the direction by code.

    A page cannot hold the former, and the latter would reorder the words around them.
    """
    return text.translate(_SHOWN)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of some tokens, as `shown`; special ones and spaces are as they are."""
    return shown(str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """One text per token; together they are the text of all, as `shown`.

    A character of several tokens belongs to the last of them: those before have "".
    """
    found: list[str] = []
    first = done = 0  # decoded with its predecessor, a token keeps the space in front of it
    for end in range(1, len(ids) + 1):
        text = decode(ids[first:end], tokenizer)
        if text.endswith(_UNFINISHED) and end < len(ids) and end - done < _LONGEST:
            found.append("")
            continue
        found.append(text[len(decode(ids[first:done], tokenizer)) :])
        first, done = done, end
    return found


def around(ids: Sequence[int], place: int, tokenizer: Any) -> tuple[str, str, str]:
    """The text before, of, and after the token at `place`; a space in front of it is before."""
    before = decode(ids[:place], tokenizer).rstrip(_UNFINISHED)
    through = decode(ids[: place + 1], tokenizer).rstrip(_UNFINISHED)
    whole = decode(ids, tokenizer)
    token = through[len(before) :]
    word = token.lstrip(" ") or token
    return through[: len(through) - len(word)], word, whole[len(through) :]
