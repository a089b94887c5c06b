"""Kinds of memories: their names in files and on the command line, and their classes.

The classes of this package are imported when their kind is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from knnlm_hf.errors import SettingError

_MODULES = {
    "knn": "knn",
    "hybrid": "hybrid",
    "cache": "cache",
    "multi_embedding": "multi_embedding",
    "mixture_of_softmaxes": "mixture_of_softmaxes",
    "centroids": "centroids",
    "mlp": "mlp",
}
"""Kind → the module of this package that has its class."""
_NO_HEADS = ("knn", "hybrid", "cache")
_classes: dict[str, type[Any]] = {}

C = TypeVar("C", bound=type[Any])


def register(cls: C) -> C:
    """Make a class of memories known by its `kind`, so that models saved with it load again.

    A decorator, for a memory of one's own. Beside the five names of a memory the class has

    - `kind: str`, its name in files;
    - `settings()`: plain data, `kind` among it;
    - `save_pretrained(folder)`: writes everything else;
    - `from_pretrained(source, *, revision, token, cache_dir, local_files_only, **settings)`, a
      class method: an equal memory, from a folder or a repository of the Hub;
    - and it may have `reference()`: (path or Hub id, commit or None) of where its files already
      are, which is kept in place of a copy.

    Register it before loading, in every process. Subclasses of `Head` are registered by themselves.

    Raises:
        SettingError: the kind is one of this package.
    """
    kind = cls.kind
    if kind in _MODULES and cls.__module__ != f"{__package__}.{_MODULES[kind]}":
        raise SettingError(f"kind {kind!r} is this package's own: give {cls.__name__} another name")
    _classes[kind] = cls
    return cls


def class_of(kind: Any, base: type[Any] = object) -> type[Any]:
    """The class of a kind.

    Args:
        kind: one of this package's, or registered.
        base: what the class must derive from.

    Raises:
        SettingError: unknown, or of another sort.
    """
    if isinstance(kind, str) and kind not in _classes and kind in _MODULES:
        import_module(f"{__package__}.{_MODULES[kind]}")
    found = _classes.get(kind) if isinstance(kind, str) else None
    if found is None or not issubclass(found, base):
        names = [name for name in (*_MODULES, *_classes) if base is object or name not in _NO_HEADS]
        raise SettingError(
            f"unknown kind of {base.__name__.lower() if base is not object else 'memory'} {kind!r}:"
            f" expected one of {', '.join(dict.fromkeys(names))}; one of your own has to be "
            "registered first"
        )
    return found
