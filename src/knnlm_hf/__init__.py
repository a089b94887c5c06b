"""Nearest-neighbour language models for Hugging Face transformers.

    P(w|c) = (1−λ) · softmax(W_sm · h_sm)  +  λ · M · softmax( mask_k(W_ds ⊗ h_ds) / t )

Names are imported on first use: `import knnlm_hf` loads neither torch, faiss nor any model code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CacheMemory": "memory",
    "HybridMemory": "memory",
    "CentroidMemory": "memory",
    "KNNLMForCausalLM": "modeling",
    "KNNLMConfig": "modeling",
    "Datastore": "build",
    "Head": "memory",
    "KNNMemory": "memory",
    "MLPMemory": "memory",
    "Memory": "memory",
    "MixtureOfSoftmaxes": "memory",
    "MultiEmbeddingHead": "memory",
    "Neighbors": "types",
    "SoftTargets": "memory",
    "TokenScores": "scores",
    "distil": "memory",
    "explanation_page": "inspection",
    "score": "scoring",
    "perplexity": "scoring",
    "tune": "tuning",
    "KNNLMError": "errors",
    "DatastoreError": "errors",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from knnlm_hf.build import Datastore as Datastore
    from knnlm_hf.errors import DatastoreError as DatastoreError
    from knnlm_hf.errors import KNNLMError as KNNLMError
    from knnlm_hf.inspection import explanation_page as explanation_page
    from knnlm_hf.memory import CacheMemory as CacheMemory
    from knnlm_hf.memory import CentroidMemory as CentroidMemory
    from knnlm_hf.memory import Head as Head
    from knnlm_hf.memory import HybridMemory as HybridMemory
    from knnlm_hf.memory import KNNMemory as KNNMemory
    from knnlm_hf.memory import Memory as Memory
    from knnlm_hf.memory import MixtureOfSoftmaxes as MixtureOfSoftmaxes
    from knnlm_hf.memory import MLPMemory as MLPMemory
    from knnlm_hf.memory import MultiEmbeddingHead as MultiEmbeddingHead
    from knnlm_hf.memory import SoftTargets as SoftTargets
    from knnlm_hf.memory import distil as distil
    from knnlm_hf.modeling import KNNLMConfig as KNNLMConfig
    from knnlm_hf.modeling import KNNLMForCausalLM as KNNLMForCausalLM
    from knnlm_hf.scores import TokenScores as TokenScores
    from knnlm_hf.scoring import perplexity as perplexity
    from knnlm_hf.scoring import score as score
    from knnlm_hf.tuning import tune as tune
    from knnlm_hf.types import Neighbors as Neighbors


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'knnlm_hf' has no attribute {name!r}")
    value = getattr(import_module(f"knnlm_hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
