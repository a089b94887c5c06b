"""A folder where everything expensive is made once, under a name that says what went into it.

    DIR/<kind>/<name>-<digest of the inputs>         a file or a folder
    DIR/<kind>/<name>-<digest of the inputs>.json    its inputs and what it cost; written last

What has no such record is not finished. Changed inputs give another name, so nothing stale is used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knnlm_hf.datastore import atomic
from knnlm_hf.errors import PersistenceError

_DIGITS = 12


class Workspace:
    """The folder of one study.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

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
        if record.is_file() and path.exists():
            return path
        begun = time.perf_counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resumes:
                make(path)
            else:
                unfinished = atomic.temporary(path)
                for leftover in (unfinished, path):
                    atomic.remove(leftover)
                make(unfinished)
                atomic.publish(unfinished, path)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise PersistenceError(
                f"{path}: cannot be written: {reason}; what is finished is kept, so the same study "
                "resumes once that is mended"
            ) from error
        write_json(record, {"inputs": inputs, "seconds": time.perf_counter() - begun})
        return path


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, text.encode())
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise PersistenceError(f"{path}: cannot be written: {reason}") from error


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote; None where there is no such file or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
