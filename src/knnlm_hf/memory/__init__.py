"""Memories: whatever turns captured hidden states into a distribution over the vocabulary."""

from knnlm_hf.memory.base import Evidence, Memory, as_memory, evidence
from knnlm_hf.memory.knn import KNNMemory

__all__ = ["Evidence", "KNNMemory", "Memory", "as_memory", "evidence"]
