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
    """A reference to a base model and to a memory, and λ.

    Args:
        base_model_name_or_path: Hub id or path of the base; None: it lies in the folder's `base/`.
        base_revision: commit of the base on the Hub, if it is known.
        lmbda: λ.
        layer: where the memory's states are captured.
        memory_settings: the memory's own `settings()`.
        store: Hub dataset id or path of the datastore; None: it lies in the folder's `memory/`.
        store_revision: its commit on the Hub, if it is known.
    """

    model_type = "knnlm"

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        lmbda: float = 0.25,
        layer: str = "att",
        memory_settings: dict[str, Any] | None = None,
        store: str | None = None,
        store_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.memory_settings = memory_settings or {}
        self.store = store
        self.store_revision = store_revision

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: the code that loads it is already in the folder."""


AutoConfig.register("knnlm", KNNLMConfig, exist_ok=True)
