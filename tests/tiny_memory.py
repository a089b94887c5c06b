"""Memories of every kind, tiny: neighbours by brute force, a head, both at once."""

from __future__ import annotations

from typing import Any

import reference
import torch
from torch import Tensor, nn

from knnlm_hf.memory import CacheMemory, MultiEmbeddingHead


class TinyMemory:
    """k nearest neighbours by brute force, in torch: the five names that the library knows."""

    def __init__(
        self, layer: str, keys: Tensor, values: Tensor, vocab_size: int, k: int, t: float
    ) -> None:
        self.layer, self.hidden_size, self.vocab_size = layer, keys.shape[1], vocab_size
        self.keys, self.values, self.k, self.t = keys.float(), values, k, t
        self.asked: list[tuple[int, ...]] = []
        self.traced = False

    def log_probs(self, hidden: Tensor) -> Tensor:
        self.traced = self.traced or torch.compiler.is_compiling()
        self.asked.append(tuple(hidden.shape))
        queries_QD = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        similarity_QN = -(queries_QD[:, None] - self.keys).square().sum(dim=-1)
        similarity_QK, ids_QK = similarity_QN.topk(min(self.k, len(self.keys)))
        probs_QV = torch.zeros(len(queries_QD), self.vocab_size)
        probs_QV.scatter_add_(1, self.values[ids_QK], (similarity_QK / self.t).softmax(dim=-1))
        return probs_QV.log().reshape(*hidden.shape[:-1], self.vocab_size)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.log_probs(hidden).gather(-1, tokens[..., None])[..., 0]


def memory_of(
    model: nn.Module, model_type: str, layer: str, *, k: int = 8, entries: int = 48
) -> TinyMemory:
    """A memory of the model's own states on random text, with random next tokens."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(7)
    texts_BT = torch.randint(3, vocab_size, (4, entries // 4), generator=generator)
    keys_ND = reference.states(model, reference.place(model, model_type, layer), texts_BT)
    keys_ND = keys_ND.flatten(0, 1)
    values_N = torch.randint(0, vocab_size, (len(keys_ND),), generator=generator)
    spread = torch.cdist(keys_ND.float(), keys_ND.float()).square().median().item()
    return TinyMemory(layer, keys_ND, values_N, vocab_size, k, max(spread, 1e-6) / 4)


KINDS = ("knn", "head", "both", "cache")


def head_of(model: nn.Module, layer: str = "att", *, n: int = 2, seed: int = 5) -> Any:
    """A head of random rows, sure enough of itself to change what the model says."""
    config = model.config.get_text_config()
    torch.manual_seed(seed)
    head = MultiEmbeddingHead(config.hidden_size, config.vocab_size, n=n, layer=layer).eval()
    with torch.no_grad():
        head.weight.mul_(3)
    return head


def memory_of_kind(kind: str, model: nn.Module, model_type: str, *, k: int = 8) -> Any:
    """One of `KINDS`: neighbours, a head, both on layers of their own, or the text itself."""
    if kind == "knn":
        return memory_of(model, model_type, "att", k=k)
    if kind == "head":
        return head_of(model)
    if kind == "cache":
        return CacheMemory.of(model, size=64, k=64, temperature=4.0)
    return [head_of(model, "ffn"), memory_of(model, model_type, "att", k=k)]


def asked(knn: Any) -> list[tuple[int, ...]]:
    """Shapes of the states for which the neighbours were searched."""
    return [shape for memory in knn.memories for shape in getattr(memory, "asked", [])]
