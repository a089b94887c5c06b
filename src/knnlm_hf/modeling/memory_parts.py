"""The memories of a kNN model in its folder: inside it, or by reference to where they lie.

One memory lies in memory/, of several each in a folder of its own: memory/0, memory/1, … What is
kept of each in config.json: its `settings` (with its kind), and either `folder` or `source` and
`revision`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from knnlm_hf.errors import PersistenceError, SettingError, first_line
from knnlm_hf.memory.kinds import class_of

MEMORY = "memory"
_NOT_SETTINGS = {"revision", "token", "cache_dir", "local_files_only", "device"}  # the caller's own


def save_memories(
    memories: Iterable[Any],
    target: Path,
    folder: Path,
    *,
    inside: bool,
    portable: bool,
    store_id: str | None,
) -> list[dict[str, Any]]:
    """Write what must lie inside into `folder`, which will be moved to `target`.

    Args:
        memories: those of the model.
        target: where the files will be; what already lies there stays.
        folder: where to write.
        inside: copy also what could be referred to.
        portable: refer to no path of this machine.
        store_id: Hub dataset id to refer to the datastore by.

    Returns:
        What config.json keeps of each.

    Raises:
        PersistenceError: a memory that cannot be saved.
    """
    memories = list(memories)
    settings = [_settings(memory) for memory in memories]
    if store_id is not None and sum(hasattr(memory, "store") for memory in memories) > 1:
        raise PersistenceError(f"store_id {store_id!r} names one datastore, the model has several")
    places = [_place_in(target, memory) for memory in memories]
    free = (MEMORY if len(memories) == 1 else f"{MEMORY}/{i}" for i in count())
    entries = []
    for memory, own, place in zip(memories, settings, places, strict=True):
        source, revision = _reference(memory, store_id)
        if portable and source is not None and Path(source).is_absolute():
            source = None
        if place is None and (inside or source is None):
            place = next(name for name in free if name not in places)
            memory.save_pretrained(folder / place)
        where = {"source": source, "revision": revision} if place is None else {"folder": place}
        entries.append({"settings": own, **where})
    return entries


def load_memories(folder: Path, entries: Any, hub: dict[str, Any]) -> Any:
    """The memory that config.json in `folder` names, of several the list.

    Raises:
        PersistenceError: one is missing, damaged, or of a kind that is not known here.
    """
    if not isinstance(entries, list) or not entries:
        raise PersistenceError(f"{folder}: config.json names no memory: pass memory=…")
    memories = [_load(folder, entry, hub) for entry in entries]
    return memories[0] if len(memories) == 1 else memories


def _load(folder: Path, entry: Any, hub: dict[str, Any]) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("settings"), dict):
        found = repr(entry)[:80]
        raise PersistenceError(f"{folder}: config.json has memory {found}, expected its settings")
    settings = dict(entry["settings"])
    kind = settings.pop("kind", None)
    if settings.keys() & _NOT_SETTINGS:
        raise PersistenceError(f"{folder}: config.json has {sorted(settings)} as settings")
    try:
        source, revision = _source(folder, entry), entry.get("revision")
        return class_of(kind).from_pretrained(source, revision=revision, **hub, **settings)
    except SettingError as error:
        raise PersistenceError(f"{folder}: its memory: {error}") from error
    except (PersistenceError, TypeError) as error:
        what = "datastore" if kind == "knn" else f"memory of kind {kind!r}"
        raise PersistenceError(
            f"{folder}: its {what} is missing or damaged ({first_line(error)}): pass memory=…"
        ) from error


def _source(folder: Path, entry: dict[str, Any]) -> str | Path:
    inside, source = entry.get("folder"), entry.get("source")
    if isinstance(inside, str):
        path = folder / inside
        if not inside.isprintable():
            raise PersistenceError(f"folder {inside!r} is no name of a folder")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PersistenceError(f"folder {inside!r} leads out of {folder}")
        return path
    if not isinstance(source, str):
        raise PersistenceError(f"config.json says neither folder nor source, but {source!r}")
    return source


def _settings(memory: Any) -> dict[str, Any]:
    needed = ("settings", "save_pretrained", "from_pretrained")
    if all(hasattr(memory, name) for name in needed):
        settings: dict[str, Any] = memory.settings()
        try:
            if isinstance(memory, class_of(settings.get("kind"))):
                return settings
        except SettingError:
            pass
    raise PersistenceError(
        f"this memory ({type(memory).__name__}) cannot be saved: expected a KNNMemory, a trained "
        "head, or a class that was given to knnlm_hf.memory.register"
    )


def _reference(memory: Any, store_id: str | None) -> tuple[str | None, str | None]:
    if store_id is not None and hasattr(memory, "store"):
        return store_id, None
    found: tuple[str | None, str | None] = getattr(memory, "reference", lambda: (None, None))()
    return found


def _place_in(target: Path, memory: Any) -> str | None:
    """The folder in `target` where the memory's store already lies, if it does."""
    store = getattr(memory, "store", None)
    if store is None or not store.path.resolve().is_relative_to(target.resolve()):
        return None
    return str(store.path.resolve().relative_to(target.resolve()).as_posix())
