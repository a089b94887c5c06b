"""Parts ↔ folder ↔ Hub. Takes paths and plain data, never a model or a datastore object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from knnlm_hf import folders
from knnlm_hf.errors import PersistenceError, first_line

# What the Hub's client raises: its own errors, and those of its HTTP library, their base class.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)


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

    A folder in whose saving a process was killed is finished first.

    Raises:
        PersistenceError: neither a folder nor a repository that can be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folders.finish(path)
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
    except _HUB_ERRORS as error:
        raise PersistenceError(
            f"{source}: no such folder, and not readable as a Hub {repo_type} repository: "
            f"{first_line(error)}"
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
    """Create the repository if need be and upload the whole folder in one commit.

    Raises:
        PersistenceError: the Hub refuses, or cannot be reached.
    """
    folders.finish(Path(folder))
    try:
        api = HfApi(token=token)
        created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        return api.upload_folder(
            folder_path=str(folder),
            repo_id=created.repo_id,
            repo_type=repo_type,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[*(ignore_patterns or []), folders.OURS],
        )
    except _HUB_ERRORS as error:
        raise PersistenceError(
            f"{repo_id}: could not be pushed to the Hub: {first_line(error)}; nothing of it is "
            "there, so push again once that is mended"
        ) from error


def hub_origin(folder: Path) -> tuple[str | None, str | None]:
    """Repo id and commit of a folder in the Hub's cache, or (None, None)."""
    found = re.search(r"(?:datasets|models)--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)$", str(folder))
    return (found[1].replace("--", "/"), found[2]) if found else (None, None)


def knn_model_card(
    base: str | None,
    architecture: str,
    lmbdas: Sequence[float],
    memories: Sequence[dict[str, Any]],
    summaries: Sequence[str],
) -> str:
    """README.md of a saved kNN model, as Markdown with YAML metadata.

    Args:
        base: id or path of the base model, if it has one.
        architecture: its class.
        lmbdas: λ of each memory.
        memories: what config.json keeps of each.
        summaries: each in a few words.
    """
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    metadata += ["- knn-lm", "- knnlm-hf", "- retrieval"]
    if base is not None and is_hub_id(base):
        metadata.append(f"base_model: {base}")
    sources = [memory.get("source") or "" for memory in memories]
    stores = [
        source
        for source, memory in zip(sources, memories, strict=True)
        if memory["settings"]["kind"] == "knn" and is_hub_id(source)
    ]
    metadata += ["datasets:", *(f"- {store}" for store in stores)] if stores else []
    rows = []
    for lmbda, memory, source, summary in zip(lmbdas, memories, sources, summaries, strict=True):
        rows.append(f"| **memory** | {summary}, {f'`{source}`' if source else 'in this folder'} |")
        rows.append(f"| λ | {lmbda:g} |")
        rows += [f"| {name} | {value} |" for name, value in memory["settings"].items()]
    return f"""---
{chr(10).join(metadata)}
---

# Nearest-neighbour language model

{architecture} mixed with {" and ".join(summaries)}:
P(w|c) = (1−Σλ) · P_LM(w|c) + Σ λ · P_memory(w|c).

| | |
|---|---|
| base model | {f"`{base}`" if base else "inside this folder"} |
{chr(10).join(rows)}

```python
from knnlm_hf import KNNLMForCausalLM

knn = KNNLMForCausalLM.from_pretrained("this folder or repository")
```

or, with `knnlm-hf` installed, `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`.

kNN-LM lowers perplexity on average while raising it for most single tokens, and does not by itself
improve open-ended generation (arXiv 2305.14625) or reasoning (arXiv 2408.11815).
"""


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository's id, `name` or `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None
