"""Parts ↔ folder ↔ Hub. Takes paths and plain data, never a model or a datastore object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from knnlm_hf.errors import PersistenceError


def local_folder(
    source: str | Path,
    repo_type: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_patterns: list[str] | None = None,
) -> Path:
    """Return the folder `source`, downloading it first where it is no folder but a Hub repo id.

    Raises:
        PersistenceError: neither a folder nor a repository that can be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    looks_local = path.is_absolute() or path.exists() or str(source).count("/") != 1
    if looks_local or str(source).startswith((".", "~")):
        raise PersistenceError(f"{source}: no such folder")
    try:
        return Path(
            snapshot_download(
                str(source),
                repo_type=repo_type,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=allow_patterns,
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PersistenceError(
            f"{source}: no such folder, and not readable as a Hub {repo_type} repository: {reason}"
        ) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload with knnlm_hf",
    revision: str | None = None,
    create_pr: bool = False,
    ignore_patterns: list[str] | None = None,
) -> Any:
    """Create the repository if need be and upload the whole folder in one commit."""
    api = HfApi(token=token)
    created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    return api.upload_folder(
        folder_path=str(folder),
        repo_id=created.repo_id,
        repo_type=repo_type,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=ignore_patterns,
    )
