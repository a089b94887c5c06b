"""Memories: whatever turns captured hidden states into a distribution over the vocabulary."""

from knnlm_hf.memory.base import Evidence, Memory, as_memory, evidence
from knnlm_hf.memory.knn import KNNMemory
from knnlm_hf.memory.multi_embedding import MultiEmbeddingHead

__all__ = ["Evidence", "KNNMemory", "Memory", "MultiEmbeddingHead", "as_memory", "evidence"]
