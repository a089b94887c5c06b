"""Files that are there whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from knnlm_hf.errors import DatastoreError, first_line, refusal
from knnlm_hf.folders import follow_umask, sync_folder

TEMPORARY = ".tmp"
"""Suffix of what is not finished; anything of that name may be removed by the next build."""


def temporary(path: Path) -> Path:
    """The name `path` has until it is finished."""
    return path.with_name(path.name + TEMPORARY)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb", buffering=0) as file:
            write_all(file, data)
            sync(file.fileno())
        publish(unfinished, path)
    finally:
        discard(unfinished)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically; return its sha-256."""
    unfinished = temporary(path)
    try:
        save_file(tensors, unfinished)
        follow_umask(unfinished)
        sha256 = file_sha256(unfinished)
        settle(unfinished, path)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(first_line(error)) from error
    finally:
        discard(unfinished)
    return sha256


def file_sha256(path: Path) -> str:
    """Sha-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a temporary folder, then give it its name; `path` must not exist."""
    unfinished = temporary(path)
    try:
        unfinished.mkdir()
        fill(unfinished)
        for file in sorted(unfinished.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    sync(opened.fileno())
        publish(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def settle(unfinished: Path, path: Path) -> None:
    """Give a written file its final name, once its bytes are on the disk."""
    with unfinished.open("rb") as file:
        sync(file.fileno())
    publish(unfinished, path)


def publish(unfinished: Path, path: Path) -> None:
    """Rename to the final name, durably."""
    os.replace(unfinished, path)
    sync_folder(path.parent)


def write_all(file: IO[bytes], data: Any) -> None:
    """Write all of it: a single unbuffered write may stop short, on a full disk for one."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while len(view):
        view = view[file.write(view) :]


def sync(descriptor: int) -> None:
    """Return when the file's contents are on the disk."""
    os.fsync(descriptor)


def clear(folder: Path) -> None:
    """Remove what a killed build left unfinished."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove what is no longer needed, if the system lets us."""
    with suppress(OSError):
        remove(path)


@contextmanager
def explaining(path: Path, what: str = "the datastore") -> Iterator[None]:
    """Turn an OSError inside the block (disk full, read-only, …) into one clear line."""
    try:
        yield
    except OSError as error:
        raise DatastoreError(
            f"{path}: cannot write {what}: {refusal(error)}; what is finished is kept, so the "
            "same work resumes once that is mended"
        ) from error
