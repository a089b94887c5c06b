"""A split → its documents as token ids, all in memory, read once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from knnlm_hf import identity
from knnlm_hf.corpus import documents
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.study.workspace import Workspace
from knnlm_hf.windows import Tokens


class Text:
    """A split as tokens.

    Args:
        parts: the documents, (n,) int32 each.
        words: whitespace-separated words of all of them; None where they were no text, or where
            only a part of them was read.
    """

    def __init__(self, parts: list[Tokens], words: int | None) -> None:
        self.documents, self.words = parts, words

    def __len__(self) -> int:
        return sum(len(part) for part in self.documents)

    @property
    def digest(self) -> str:
        """Sha-256 of the tokens and of where documents end."""
        found = hashlib.sha256()
        for part in self.documents:
            found.update(len(part).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(part, dtype="<i4").tobytes())
        return found.hexdigest()


def read_text(
    corpus: Any, tokenizer: Any, config: Any, limit: int | None, workspace: Workspace
) -> Text:
    """The first `limit` tokens of a corpus (None: all); those of a text file are kept.

    Raises:
        CorpusError: the corpus cannot be read, or has no text.
    """

    def read() -> Text:
        return _read(corpus, tokenizer, config.vocab_size, config, limit)

    if not isinstance(corpus, str | PathLike) or tokenizer is None:
        return read()
    path = Path(corpus).expanduser()
    if not path.is_file():
        return read()  # which says what is wrong
    inputs = {
        "file": file_sha256(path), "tokenizer": identity.tokenizer_hash(tokenizer), "limit": limit,
    }  # fmt: skip
    return _load(workspace.keep("tokens", path.stem, inputs, _saver(read)))


def _read(corpus: Any, tokenizer: Any, vocab_size: int, config: Any, limit: int | None) -> Text:
    stream = documents(corpus, tokenizer, vocab_size=vocab_size, config=config)
    found: list[Tokens] = []
    open_pieces: list[Tokens] = []
    read = 0
    for piece in stream:
        left = None if limit is None else limit - read
        open_pieces.append(piece.tokens[:left])
        read += len(open_pieces[-1])
        is_cut = limit is not None and read >= limit
        if not piece.more or is_cut:
            found.append(np.concatenate(open_pieces))
            open_pieces = []
        if is_cut:
            return Text(found, None)
    return Text(found, stream.words)


def _saver(read: Callable[[], Text]) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        text = read()
        columns = {
            "tokens": torch.from_numpy(np.concatenate(text.documents)),
            "lengths": torch.tensor([len(part) for part in text.documents]),
            "words": torch.tensor(-1 if text.words is None else text.words),
        }
        save_file(columns, path)

    return save


def _load(path: Path) -> Text:
    columns = load_file(path)
    ends = columns["lengths"].cumsum(0)[:-1].tolist()
    words = int(columns["words"])
    return Text(np.split(columns["tokens"].numpy(), ends), None if words < 0 else words)
