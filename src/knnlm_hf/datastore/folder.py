"""The folder a store is built in: locked against other builds, and what is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from knnlm_hf import identity
from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.manifest import NAME, Manifest, load
from knnlm_hf.datastore.shards import check_shards
from knnlm_hf.errors import DatastoreError, ModelMismatchError

LOCK = ".lock"
TOKENIZER = "tokenizer"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made if need be, against other writers; an empty one is removed again."""
    lock = FileLock(folder / LOCK, timeout=0)
    with atomic.explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise DatastoreError(
                f"{folder}: another process is building or changing the store there: wait for it, "
                "or choose another folder"
            ) from error
    try:
        yield
    finally:
        is_empty = {file.name for file in folder.iterdir()} <= {LOCK}
        lock.release()
        if is_empty:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def existing(
    folder: Path, wanted: Manifest, resume: bool, model: nn.Module, tokenizer: Any
) -> Manifest | None:
    """The manifest of the store already in `folder`, if its settings are those wanted."""
    with atomic.explaining(folder):
        atomic.clear(folder)
        if not (folder / NAME).exists():
            foreign = {file.name for file in folder.iterdir()} - {LOCK, TOKENIZER}
            if foreign:
                raise DatastoreError(
                    f"{folder}: holds {min(foreign)!r} but no datastore: choose another folder"
                )
            return None
    manifest = load(folder)
    if not resume:
        raise DatastoreError(
            f"{folder}: there is a datastore already: delete it, choose another folder, or build "
            "with resume=True"
        )
    if manifest.subsample is not None:
        raise DatastoreError(f"{folder}: holds a subsample of a datastore: choose another folder")
    if manifest.appended:
        raise DatastoreError(
            f"{folder}: the datastore there has been appended to, and is not of one corpus any "
            "more: open it with Datastore.open, or choose another folder"
        )
    skipped = {"dim", "model", "shards", "documents", "complete", "subsample"}
    skipped |= {"removed", "appended"}
    for field in fields(Manifest):
        theirs, ours = getattr(manifest, field.name), getattr(wanted, field.name)
        if field.name not in skipped and theirs != ours:
            raise DatastoreError(
                f"{folder}: the datastore there has {field.name} {theirs!r}, this build asks for "
                f"{ours!r}: give the same settings, or build into another folder"
            )
    found = identity.differences(manifest.model, model, tokenizer)
    if found:
        raise ModelMismatchError(
            f"{folder}: the datastore there was built with {identity.name(manifest.model)}, not "
            f"with the model given ({identity.name(wanted.model)}): {'; '.join(found)}. Give the "
            "same model, or build into another folder"
        )
    check_shards(folder, manifest)
    return manifest
