"""KNNLMConfig: the config.json of a saved kNN model. In memory a wrapper keeps its model's own."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

CODE_FILE = "modeling_knnlm.py"
"""Goes into every saved folder, so that `trust_remote_code=True` works without an import."""
CODE = '''"""Loads this folder with transformers' Auto classes; needs `pip install knnlm-hf`."""

from knnlm_hf.modeling import KNNLMConfig, KNNLMForCausalLM

__all__ = ["KNNLMConfig", "KNNLMForCausalLM"]
'''


class KNNLMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A reference to a base model and to memories, and their λ.

    Args:
        base_model_name_or_path: Hub id or path of the base; None: it lies in the folder's `base/`.
        base_revision: commit of the base on the Hub, if it is known.
        lmbda: λ; of several memories the list.
        layer: where the memory's states are captured; of several memories the list.
        memories: of each memory its `settings`, and either `folder`, where it lies in this folder,
            or `source`, its Hub id or path, and `revision`.
        kwargs: of `PreTrainedConfig`. The fields `memory_settings`, `store` and `store_revision` of
            version 0.1 are understood, and say the same of the only memory.
    """

    model_type = "knnlm"

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        lmbda: float | list[float] = 0.25,
        layer: str | list[str] = "att",
        memories: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        settings, store = kwargs.pop("memory_settings", None), kwargs.pop("store", None)
        revision = kwargs.pop("store_revision", None)
        if not memories and settings:
            where = {"source": store, "revision": revision} if store else {"folder": "memory"}
            memories = [{"settings": settings, **where}]
        kwargs.setdefault("architectures", ["KNNLMForCausalLM"])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_knnlm.KNNLMConfig",
                "AutoModelForCausalLM": "modeling_knnlm.KNNLMForCausalLM",
            },
        )
        super().__init__(**kwargs)
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.lmbda = lmbda
        self.layer = layer
        self.memories = memories or []

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: the code that loads it is already in the folder."""


AutoConfig.register("knnlm", KNNLMConfig, exist_ok=True)
