"""Reading what a stranger may have written: plain files inside their folder, JSON of bounded size.

Nothing is read before these checks, and nothing is allocated because a file says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from knnlm_hf.errors import KNNLMError

MOST_JSON = 64 << 20
"""Bytes that a JSON file of ours may have."""


def inside(folder: Path, name: str, refuse: type[KNNLMError]) -> Path:
    """The path of the regular file `name` in `folder`, or `refuse`.

    A symbolic link may not lead out of the folder, except to the Hub cache's own store of blobs,
    where every file of a snapshot is such a link.

    Raises:
        refuse: there is no such file, it is no regular file, or it lies elsewhere.
    """
    path = folder / name
    if not path.is_file():
        raise refuse(f"{path}: the file is missing")
    real, home = path.resolve(), folder.resolve()
    snapshots = (parent for parent in home.parents if parent.name == "snapshots")
    homes = [home, *(parent.parent / "blobs" for parent in snapshots)]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise refuse(f"{path}: leads out of its folder, to {real}, which is refused")
    return path


def read_json(folder: Path, name: str, refuse: type[KNNLMError], most: int = MOST_JSON) -> Any:
    """The contents of a JSON file in `folder`.

    Raises:
        refuse: missing, elsewhere (see `inside`), larger than `most` bytes, or no JSON.
    """
    path = inside(folder, name, refuse)
    try:
        size = path.stat().st_size
        if size > most:
            raise refuse(f"{path}: has {size:,} bytes, expected {most:,} at most: not ours")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"{path}: is damaged, it cannot be read as JSON ({error})") from error


def is_count(value: Any, most: int = 1 << 62, *, least: int = 1) -> TypeGuard[int]:
    """Whether it is a whole number from `least` to `most`, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
