"""A kNN model ↔ a folder: its parts by reference, or their files inside.

config.json             KNNLMConfig: base, revision, λ, layer, memory, store
modeling_knnlm.py       lets transformers load the folder with trust_remote_code
generation_config.json, README.md, the tokenizer's files
base/                   the base model, if it is saved with it
memory/                 the datastore, if it is saved with it
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import PersistenceError, first_line
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling.config import CODE, CODE_FILE, KNNLMConfig
from knnlm_hf.modeling.fit import was_changed
from knnlm_hf.persistence import hub_origin, is_hub_id, knn_model_card, local_folder

BASE, MEMORY = "base", "memory"


def save(
    knn: Any,
    target: Path,
    folder: Path,
    *,
    save_base: bool | None,
    save_memory: bool,
    tokenizer: Any,
    store_id: str | None,
    base_options: dict[str, Any],
) -> None:
    """Write all files of `knn` into `folder`, which will be moved to `target`.

    Raises:
        PersistenceError: a memory that has no settings, adapters that a reference would lose.
    """
    base, memory = knn.unwrap(), knn.memory
    settings, store = _settings(memory), memory.store
    base_id, revision = base_reference(base)
    inside = base_id is not None and Path(base_id) == (target / BASE).resolve()
    if save_base is None:
        save_base = base_id is None or was_changed(base, knn.weights_when_wrapped)
    if any(".lora_" in name or ".base_layer." in name for name, _ in base.named_parameters()):
        raise PersistenceError(
            "the model carries adapters, which its folder would not hold: merge them into it first "
            "(merge_and_unload), or save them apart"
        )
    if save_base:
        base.save_pretrained(folder / BASE, **base_options)
    store_is_here = store.path.resolve() == (target / MEMORY).resolve()
    if save_memory and not store_is_here:
        ignored = shutil.ignore_patterns(".lock", "*.tmp")
        shutil.copytree(store.path, folder / MEMORY, ignore=ignored)
    store_ref, store_revision = (store_id, None) if store_id else hub_origin(store.path)
    if store_ref is None:
        store_ref = str(store.path.resolve())
    config = KNNLMConfig(
        base_model_name_or_path=None if save_base or inside else base_id,
        base_revision=None if save_base or inside else revision,
        lmbda=knn.lmbda,
        layer=knn.capture_point.layer,
        memory_settings=settings,
        store=None if save_memory or store_is_here else store_ref,
        store_revision=store_revision,
    )
    config.to_json_file(folder / "config.json")
    knn.generation_config.save_pretrained(folder)
    (folder / CODE_FILE).write_text(CODE, encoding="utf-8")
    origin = base_id if is_hub_id(base_id or "") else config.base_model_name_or_path
    card = knn_model_card(
        origin, type(base).__name__, knn.lmbda, settings, config.store, len(store), config.layer
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    tokenizer = tokenizer or store.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(
    source: str | Path,
    *,
    config: Any = None,
    base_model: Any = None,
    memory: Any = None,
    hub: dict[str, Any],
    base_options: dict[str, Any],
) -> tuple[PreTrainedModel, Any, KNNLMConfig, GenerationConfig | None]:
    """Load the parts of a saved kNN model.

    Args:
        source: a folder or Hub id.
        config: overrides the folder's.
        base_model: a model, path or Hub id instead of the base that was saved.
        memory: a memory, store, path or Hub id instead of the one that was saved.
        hub: revision, token, cache_dir, local_files_only, of the folder.
        base_options: of the base's `from_pretrained`.
    """
    folder = local_folder(source, "model", **hub)
    if not isinstance(config, KNNLMConfig):
        config = _config(folder)
    shared = {k: v for k, v in hub.items() if k != "revision"}
    if not isinstance(base_model, PreTrainedModel) and not hasattr(base_model, "get_base_model"):
        base_model = _load_base(folder, config, base_model, {**shared, **base_options})
    if memory is None:
        memory = _load_memory(folder, config, shared)
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    return base_model, memory, config, generation


def _config(folder: Path) -> KNNLMConfig:
    if not (folder / "config.json").is_file():
        raise PersistenceError(f"{folder}: no kNN model there: config.json is missing")
    try:
        values, _ = KNNLMConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise PersistenceError(f"{folder}: config.json cannot be read") from error
    if values.get("model_type") != KNNLMConfig.model_type:
        raise PersistenceError(
            f"{folder}: holds a {values.get('model_type')!r} model, expected a kNN model ('knnlm'):"
            " load it with AutoModelForCausalLM and wrap it"
        )
    config: KNNLMConfig = KNNLMConfig.from_dict(values)
    return config


def _load_base(folder: Path, config: KNNLMConfig, given: Any, options: dict[str, Any]) -> Any:
    source = given or config.base_model_name_or_path
    if source is None:
        source = folder / BASE
        if not source.is_dir():
            raise PersistenceError(f"{folder}: the base model is missing: pass base_model=…")
    elif given is None and config.base_revision:
        options["revision"] = config.base_revision
    try:
        return AutoModelForCausalLM.from_pretrained(str(source), **options)
    except (OSError, ValueError) as error:
        raise PersistenceError(
            f"{folder}: its base model {str(source)!r} cannot be loaded: "
            f"{first_line(error)}: pass base_model="
        ) from error


def _load_memory(folder: Path, config: KNNLMConfig, hub: dict[str, Any]) -> KNNMemory:
    settings = dict(config.memory_settings)
    kind = settings.pop("kind", None)
    if kind != "knn":
        raise PersistenceError(
            f"{folder}: its memory is of kind {kind!r}, expected 'knn': a newer knnlm_hf wrote it, "
            "or pass memory=…"
        )
    source, revision = config.store or str(folder / MEMORY), config.store_revision
    try:
        store = DatastoreReader.open(source, revision=revision, **hub)
    except PersistenceError as error:
        raise PersistenceError(
            f"{folder}: its datastore is missing ({error}): pass memory=…"
        ) from (error)
    return KNNMemory(store, **settings)


def _settings(memory: Any) -> dict[str, Any]:
    if not hasattr(memory, "settings") or not hasattr(memory, "store"):
        raise PersistenceError(
            f"this memory ({type(memory).__name__}) cannot be saved: expected a KNNMemory"
        )
    settings: dict[str, Any] = memory.settings()
    return settings


def base_reference(base: PreTrainedModel) -> tuple[str | None, str | None]:
    """Hub id and commit, or absolute path and None, or nothing for a model made from a config."""
    name = getattr(base.config, "_name_or_path", "") or getattr(base, "name_or_path", "")
    if not name:
        return None, None
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    return str(name), getattr(base.config, "_commit_hash", None)
