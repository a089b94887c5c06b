"""A folder where everything expensive is made once, under a name that says what went into it.

    DIR/<kind>/<name>-<digest of the inputs>         a file or a folder
    DIR/<kind>/<name>-<digest of the inputs>.json    its inputs and its seconds; written last

What has no such record is not finished. Changed inputs give another name, so nothing stale is used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnlm_hf.datastore import atomic
from knnlm_hf.errors import PersistenceError, refusal

_DIGITS = 12


class Workspace:
    """The folder of one study.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.spent: dict[Path, float] = {}
        """Seconds that what was asked for had cost before it was asked for; 0 of what is new.
        Whoever wants to know what a part of a study needs clears it first."""
        self._within = 0.0

    def keep(
        self,
        kind: str,
        name: str,
        inputs: dict[str, Any],
        make: Callable[[Path], object],
        *,
        resumes: bool = False,
    ) -> Path:
        """The path of something that `make` has written, now or in an earlier run.

        Args:
            kind: the folder it lies in: "stores", "indexes", "heads", …
            name: for people; what distinguishes it is `inputs`.
            inputs: plain data: all that its contents depend on.
            make: writes a file or a folder at the path it is given. A run that is killed while it
                writes leaves nothing that the next one would use.
            resumes: `make` continues what a killed run left at the path, which it then gets under
                its final name; otherwise it always starts from nothing.

        Raises:
            PersistenceError: the disk is full, or cannot be written.
        """
        path = self.folder / kind / f"{name}-{digest(inputs)[:_DIGITS]}"
        record = path.with_name(path.name + ".json")
        with writing(
            path, "; what is finished is kept, so the same study resumes once that is mended"
        ):
            if record.is_file() and path.exists():
                self.spent.setdefault(path, _seconds(record))
                return path
            before, self._within = self._within, 0.0
            begun = time.perf_counter()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _make(path, make, resumes)
            finally:  # its own seconds are without those of what was made while it was made
                whole = time.perf_counter() - begun
                own, self._within = whole - self._within, before + whole
        write_json(record, {"inputs": inputs, "seconds": own})
        self.spent[path] = 0.0
        return path


def _make(path: Path, make: Callable[[Path], object], resumes: bool) -> None:
    if resumes:
        make(path)
        return
    unfinished = atomic.temporary(path)
    for leftover in (unfinished, path):
        atomic.remove(leftover)
    make(unfinished)
    atomic.publish(unfinished, path)


def _seconds(record: Path) -> float:
    found = read_json(record)
    seconds = found.get("seconds") if isinstance(found, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else 0.0


@contextmanager
def writing(path: Path, more: str = "") -> Iterator[None]:
    """What writes at a path: the system's refusal becomes one line that names it.

    Raises:
        PersistenceError: the disk is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise PersistenceError(f"{path}: cannot be written: {refusal(error)}{more}") from error


def digest(data: Any) -> str:
    """Sha-256 of plain data: the same for equal data, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write plain data as a file that is there whole or not at all.

    Raises:
        PersistenceError: the disk is full, or cannot be written.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, text.encode())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote; None where there is no such file or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
