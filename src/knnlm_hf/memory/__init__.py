"""Memories: whatever turns captured hidden states into a distribution over the vocabulary."""

from knnlm_hf.memory.base import Memory, as_memory, open_source
from knnlm_hf.memory.cache import CacheMemory
from knnlm_hf.memory.centroids import CentroidMemory
from knnlm_hf.memory.distillation import distil
from knnlm_hf.memory.evidence import Evidence, evidence
from knnlm_hf.memory.head import Head
from knnlm_hf.memory.hybrid import HybridMemory
from knnlm_hf.memory.kinds import register
from knnlm_hf.memory.knn import KNNMemory
from knnlm_hf.memory.mixture_of_softmaxes import MixtureOfSoftmaxes
from knnlm_hf.memory.mlp import MLPMemory
from knnlm_hf.memory.multi_embedding import MultiEmbeddingHead
from knnlm_hf.memory.soft_targets import SoftTargets

__all__ = [
    "CacheMemory", "CentroidMemory", "Evidence", "Head", "HybridMemory", "KNNMemory", "MLPMemory",
    "Memory", "MixtureOfSoftmaxes", "MultiEmbeddingHead", "SoftTargets", "as_memory", "distil",
    "evidence", "open_source", "register",
]  # fmt: skip
