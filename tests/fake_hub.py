"""A Hub in a folder: what was pushed can be loaded again, as from the client's own cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from knnlm_hf import persistence


class FakeHub:
    """Stands in for the client's calls, and keeps what they were told."""

    COMMIT = "c0ffee"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []

        def create_repo(_: HfApi, repo_id: str, **options: Any) -> Any:
            self.created = {"repo_id": repo_id, **options}
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(_: HfApi, **options: Any) -> str:
            self.uploaded = options
            place = self.folder(options["repo_id"], options["repo_type"])
            ignored = shutil.ignore_patterns(*(options.get("ignore_patterns") or []))
            shutil.copytree(options["folder_path"], place, ignore=ignored)
            return "commit"

        def snapshot_download(repo_id: str, **options: Any) -> str:
            self.asked.append({"repo_id": repo_id, **options})
            place = self.folder(repo_id, options["repo_type"])
            if not place.is_dir():
                raise FileNotFoundError(f"404: no {options['repo_type']} {repo_id}")
            return str(place)

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(persistence, "snapshot_download", snapshot_download)

    def folder(self, repo_id: str, repo_type: str = "model") -> Path:
        """Where a repository lies, named as in the client's cache."""
        name = f"{repo_type}s--{repo_id.replace('/', '--')}"
        return self.root / name / "snapshots" / self.COMMIT
