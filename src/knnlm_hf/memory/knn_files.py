"""A datastore as part of a saved model: by reference to where it lies, or copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.folders import OURS, filled_at_once
from knnlm_hf.persistence import hub_origin


class KNNFiles:
    """What `KNNMemory` inherits: saving and loading of its store; settings are kept apart."""

    store: DatastoreReader

    @property
    def summary(self) -> str:
        """It in a few words, for cards."""
        return f"a datastore of {len(self.store):,} entries"

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Copy the datastore with its indexes, as it is in its folder now.

        Raises:
            PersistenceError: the folder cannot be written.
        """
        target = Path(save_directory).expanduser().absolute()
        if target.resolve() == self.store.path.resolve():
            return
        ignored = shutil.ignore_patterns(".lock", "*.tmp", OURS)
        with filled_at_once(target) as folder:
            shutil.copytree(self.store.path, folder, ignore=ignored, dirs_exist_ok=True)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> Self:
        """A memory of these settings on the datastore in a folder or a dataset repository.

        Raises:
            PersistenceError, DatastoreError: no datastore there, or a damaged one.
            KNNLMError: a setting out of range, an index that the store does not have.
        """
        store = DatastoreReader.open(
            source, revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only,
        )  # fmt: skip
        return cls(store, **settings)  # type: ignore[call-arg]

    def reference(self) -> tuple[str | None, str | None]:
        """Hub id and commit of the datastore, or its path and None."""
        repo, commit = hub_origin(self.store.path)
        return (repo, commit) if repo is not None else (str(self.store.path.resolve()), None)
