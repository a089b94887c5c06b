"""save_pretrained, from_pretrained and push_to_hub of the wrapper."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from knnlm_hf.folders import filled_at_once
from knnlm_hf.modeling import parts
from knnlm_hf.modeling.config import KNNLMConfig
from knnlm_hf.persistence import push_folder


class Saving:
    """What KNNLMForCausalLM inherits; its parts go to and from folders in `parts`."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        save_base: bool | None = None,
        save_memory: bool = False,
        store_id: str | None = None,
        tokenizer: Any = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **base_options: Any,
    ) -> None:
        """Save as a folder that `from_pretrained` and transformers' Auto classes load.

        Base and datastores are kept as references (Hub id and commit, or absolute path), as is a
        head that came from the Hub; any other memory is put into the folder. Nothing half-written
        is left on an error.

        Args:
            save_directory: folder; its files of the same names are replaced.
            save_base: put the base's weights into the folder too; default: if it has no id or path,
                or was trained since it was loaded.
            save_memory: put copies of what could be referred to, the datastores, there too.
            store_id: Hub dataset id to refer to the datastore by.
            tokenizer: saved along; default: the one kept with a datastore, or beside the base.
            push_to_hub: also upload the folder, to `repo_id` or the folder's name.
            repo_id: see `push_to_hub`.
            base_options: of the base's `save_pretrained`, where it is saved. A `state_dict` (from
                Trainer) saves the base.

        Raises:
            PersistenceError: a memory that cannot be saved, adapters that would be lost, a folder
                that cannot be written.
        """
        if not base_options.get("is_main_process", True):
            return
        if base_options.get("state_dict") is not None and save_base is None:
            save_base = True
        target = Path(save_directory).expanduser().absolute()
        with filled_at_once(target) as folder:
            parts.save(
                self, target, folder, save_base=save_base, save_memory=save_memory,
                portable=False, tokenizer=tokenizer, store_id=store_id, base_options=base_options,
            )  # fmt: skip
        if push_to_hub:
            push_folder(target, repo_id or target.name, "model", token=base_options.get("token"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_base: bool | None = None,
        save_memory: bool | None = None,
        store_id: str | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Save into a temporary folder and upload it in one commit.

        Args:
            repo_id: model repository, made if need be.
            store_id, tokenizer: as in `save_pretrained`.
            save_base: default: unless the base has a Hub id.
            save_memory: put the memories in; default: those that are not on the Hub themselves.
            options: private, token, commit_message, revision, create_pr.
        """
        model: Any = self
        # A path on this machine says nothing to others.
        if save_base is None and Path(parts.base_reference(model.unwrap())[0] or "/").is_absolute():
            save_base = True
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            parts.save(
                model, folder, folder, save_base=save_base, save_memory=bool(save_memory),
                portable=save_memory is None, tokenizer=tokenizer, store_id=store_id,
                base_options={},
            )  # fmt: skip
            return push_folder(folder, repo_id, "model", **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        base_model: Any = None,
        memory: Any = None,
        lmbda: float | list[float] | None = None,
        allow_mismatch: bool = False,
        config: Any = None,
        **options: Any,
    ) -> Any:
        """Load what `save_pretrained` or `push_to_hub` saved.

        Args:
            pretrained_model_name_or_path: folder or Hub model id.
            base_model: a model, path or id instead of the saved base.
            memory: a memory, datastore, path or id (or a list) instead of the saved one.
            lmbda: λ instead of the saved one.
            allow_mismatch: load a base that the memory was not made with, knowingly.
            config: a `KNNLMConfig` instead of the folder's.
            options: revision, token, cache_dir and local_files_only say where from; all others
                (dtype, device_map, quantization_config, …) are the base's.

        Raises:
            PersistenceError: no kNN model there, or a part of it is missing.
            ModelMismatchError: the base is not the one the memory was made with.
        """
        names = ("revision", "token", "cache_dir", "local_files_only")
        hub = {name: options.pop(name) for name in names if options.get(name) is not None}
        for name in (*names, "subfolder", "_from_auto", "adapter_kwargs", "code_revision"):
            options.pop(name, None)
        if options.get("dtype") is None and isinstance(config, KNNLMConfig):
            options["dtype"] = config.dtype  # where older Auto classes put the caller's
        base, memory, config, generation = parts.load(
            pretrained_model_name_or_path, config=config, base_model=base_model, memory=memory,
            hub=hub, base_options={n: value for n, value in options.items() if value is not None},
        )  # fmt: skip
        info = None
        if isinstance(base, tuple):  # with output_loading_info=True
            base, info = base
        share = config.lmbda if lmbda is None else lmbda
        wrapping: Any = cls.__dict__.get("_knnlm_mixin", cls)
        knn = wrapping(base, memory, share, layer=config.layer, allow_mismatch=allow_mismatch)
        if generation is not None:
            knn.generation_config = generation
        return knn if info is None else (knn, info)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Do nothing: the code that loads it is already in the folder."""
