"""A kNN model ↔ a folder: its parts by reference, or their files inside.

config.json             KNNLMConfig: base, revision, λ, layer, memories
modeling_knnlm.py       lets transformers load the folder with trust_remote_code
generation_config.json, README.md, the tokenizer's files
base/                   the base model, if it is saved with it
memory/                 what is saved with it of its memories, see `memory_parts`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from knnlm_hf.errors import ModelMismatchError, PersistenceError, first_line
from knnlm_hf.folders import finish
from knnlm_hf.modeling.config import CODE, CODE_FILE, KNNLMConfig
from knnlm_hf.modeling.fit import was_changed
from knnlm_hf.modeling.memory_parts import load_memories, save_memories
from knnlm_hf.persistence import is_hub_id, knn_model_card, local_folder
from knnlm_hf.untrusted import read_json

BASE = "base"


def save(
    knn: Any,
    target: Path,
    folder: Path,
    *,
    save_base: bool | None,
    save_memory: bool,
    portable: bool,
    tokenizer: Any,
    store_id: str | None,
    base_options: dict[str, Any],
) -> None:
    """Write all files of `knn` into `folder`, which will be moved to `target`.

    Raises:
        PersistenceError: a memory that cannot be saved, adapters that a reference would lose.
    """
    base = knn.unwrap()
    base_id, revision = base_reference(base)
    inside = base_id is not None and Path(base_id) == (target / BASE).resolve()
    if save_base is None:
        save_base = base_id is None or was_changed(base, knn.weights_when_wrapped)
    if any(".lora_" in name or ".base_layer." in name for name, _ in base.named_parameters()):
        raise PersistenceError(
            "the model carries adapters, which its folder would not hold: merge them into it first "
            "(merge_and_unload), or save them apart"
        )
    memories = save_memories(
        knn.memories, target, folder, inside=save_memory, portable=portable, store_id=store_id
    )
    if save_base:
        base.save_pretrained(folder / BASE, **base_options)
    config = KNNLMConfig(
        base_model_name_or_path=None if save_base or inside else base_id,
        base_revision=None if save_base or inside else revision,
        lmbda=list(knn.lmbdas) if len(memories) > 1 else knn.lmbda,
        layer=[point.layer for point in knn.capture_points]
        if len(memories) > 1
        else knn.capture_point.layer,
        memories=memories,
    )
    config.to_json_file(folder / "config.json")
    knn.generation_config.save_pretrained(folder)
    (folder / CODE_FILE).write_text(CODE, encoding="utf-8")
    origin = base_id if is_hub_id(base_id or "") else config.base_model_name_or_path
    summaries = [getattr(memory, "summary", type(memory).__name__) for memory in knn.memories]
    card = knn_model_card(origin, type(base).__name__, knn.lmbdas, memories, summaries)
    (folder / "README.md").write_text(card, encoding="utf-8")
    tokenizer = tokenizer or _tokenizer_of(knn, base_id)
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
    if finish(Path(source).expanduser()):
        config = None  # subtle: the Auto classes have read it before, from the files replaced now
    folder = local_folder(source, "model", **hub)
    if not isinstance(config, KNNLMConfig):
        config = _config(folder)
    shared = {k: v for k, v in hub.items() if k != "revision"}
    if not isinstance(base_model, PreTrainedModel) and not hasattr(base_model, "get_base_model"):
        base_model = _load_base(folder, config, base_model, {**shared, **base_options})
    if memory is None:
        memory = load_memories(folder, config.memories, shared)
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = _generation_config(folder)
    return base_model, memory, config, generation


def _config(folder: Path) -> KNNLMConfig:
    if not (folder / "config.json").is_file():
        raise PersistenceError(f"{folder}: no kNN model there: config.json is missing")
    values = read_json(folder, "config.json", PersistenceError)
    if not isinstance(values, dict):
        raise PersistenceError(f"{folder}: config.json is no object, expected that of a kNN model")
    if values.get("model_type") != KNNLMConfig.model_type:
        raise PersistenceError(
            f"{folder}: holds a {values.get('model_type')!r} model, expected a kNN model ('knnlm'):"
            " load it with AutoModelForCausalLM and wrap it"
        )
    try:
        config: KNNLMConfig = KNNLMConfig.from_dict(values)
    except Exception as error:  # whatever transformers makes of its fields
        raise PersistenceError(f"{folder}: config.json is damaged: {first_line(error)}") from error
    return config


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of its fields
        raise PersistenceError(
            f"{folder}: generation_config.json is damaged: {first_line(error)}"
        ) from error
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


def _tokenizer_of(knn: Any, base_id: str | None) -> Any:
    """The tokenizer kept with a datastore, or else the one beside the base, if it is the same."""
    for memory in knn.memories:
        found = getattr(getattr(memory, "store", None), "tokenizer", None)
        if found is not None:
            return found
    if base_id is None:
        return None
    try:
        found = AutoTokenizer.from_pretrained(base_id, local_files_only=True)
        for memory in knn.memories:
            getattr(memory, "check_tokenizer", lambda tokenizer: None)(found)
    except (OSError, ValueError, ModelMismatchError):
        return None
    return found


def base_reference(base: PreTrainedModel) -> tuple[str | None, str | None]:
    """Hub id and commit, or absolute path and None, or nothing for a model made from a config."""
    name = getattr(base.config, "_name_or_path", "") or getattr(base, "name_or_path", "")
    if not name:
        return None, None
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    return str(name), getattr(base.config, "_commit_hash", None)
