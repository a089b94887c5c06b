"""What the library should give, computed without it: a plain forward, a plain hook, float64 numpy.

Nothing here imports `knnlm_hf`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

FEED_FORWARD = {
    "gpt2": "transformer.h.1.mlp",
    "gpt_neo": "transformer.h.1.mlp",
    "gpt_neox": "gpt_neox.layers.1.mlp",
    "gpt_neox_japanese": "gpt_neox_japanese.layers.1.mlp",
    "gptj": "transformer.h.1.mlp",
    "codegen": "transformer.h.1.mlp",
    "gpt_bigcode": "transformer.h.1.mlp",
    "openai-gpt": "transformer.h.1.mlp",
    "ctrl": "transformer.h.1.ffn",
    "bloom": "transformer.h.1.mlp",
    "opt": "model.decoder.layers.1.fc1",
    "xglm": "model.layers.1.fc1",
    "biogpt": "biogpt.layers.1.fc1",
    "bart": "model.decoder.layers.1.fc1",
    "trocr": "model.decoder.layers.1.fc1",
    "bert": "bert.encoder.layer.1.intermediate",
    "llama4_text": "model.layers.1.feed_forward",
    "falcon": "transformer.h.1.mlp",
    "mpt": "transformer.blocks.1.ffn",
    "granitemoe": "model.layers.1.block_sparse_moe",
    "granitemoehybrid": "model.layers.1.block_sparse_moe",
    "mamba": None,
    "mamba2": None,
    "falcon_mamba": None,
    "jamba": "model.layers.1.feed_forward",
    "bamba": "model.layers.1.feed_forward",
    "recurrent_gemma": "model.layers.1.mlp_block",
    "rwkv": "rwkv.blocks.1.feed_forward",
    "lfm2": "model.layers.1.feed_forward",
}
"""Model type → the last feed-forward sublayer's path, where it is not `model.layers.1.mlp`."""


def place(model: nn.Module, model_type: str, layer: str) -> tuple[nn.Module, bool]:
    """The module whose input (True) or output (False) `layer` means."""
    path = FEED_FORWARD.get(model_type, "model.layers.1.mlp")
    if layer == "final":
        return model.get_output_embeddings(), True
    if layer == "att":
        return model.get_submodule(path), True
    if layer == "ffn":
        return model.get_submodule(path.rsplit(".", 1)[0] if path else "backbone.layers.1"), False
    return model.get_submodule(layer), False


@torch.no_grad()
def run(model: nn.Module, where: tuple[nn.Module, bool], *args: Any, **kwargs: Any) -> Any:
    """The model's plain output, and the states at `where` as its forward went."""
    module, is_input = where
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        values = [*args, *kwargs.values()] if is_input else output
        first = values if isinstance(values, Tensor) else values[0]
        seen.append(first.detach().clone())

    register = module.register_forward_pre_hook if is_input else module.register_forward_hook
    handle = register(keep, with_kwargs=True)
    try:
        output = model(*args, **kwargs)
    finally:
        handle.remove()
    return output, seen[-1]


def states(model: nn.Module, where: tuple[nn.Module, bool], input_ids: Tensor) -> Tensor:
    """(B, T, D) states of a plain forward."""
    _, states = run(model, where, input_ids)
    return states.reshape(*input_ids.shape, -1)


def log_softmax(logits: Array) -> Array:
    """(..., V) → (..., V)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def knn_probs(queries: Array, keys: Array, values: Any, k: int, t: float, vocab: int) -> Array:
    """(Q, V) by brute force: squared distances to all keys, the k smallest, softmax, sum."""
    probs = np.zeros((len(queries), vocab))
    for row, query in enumerate(queries):
        similarity = -((keys - query) ** 2).sum(axis=1)
        nearest = np.argsort(-similarity, kind="stable")[:k]
        weights = np.exp((similarity[nearest] - similarity[nearest].max()) / t)
        for weight, entry in zip(weights / weights.sum(), nearest, strict=True):
            probs[row, values[entry]] += weight
    return probs


def head_probs(queries: Array, weight: Any, n: int, vocab: int) -> Array:
    """(Q, V) of a head with n rows per token: softmax over all rows, summed by token."""
    logits = queries @ weight.detach().double().numpy().T
    return np.exp(log_softmax(logits)).reshape(len(queries), vocab, n).sum(axis=2)


def memory_probs(states: Tensor, memory: Any, vocab: int) -> Array:
    """(..., V) of a memory, from its raw contents."""
    queries = states.double().numpy().reshape(-1, states.shape[-1])
    if hasattr(memory, "weight"):
        probs = head_probs(queries, memory.weight, memory.n, vocab)
    else:
        keys, values = memory.keys.double().numpy(), memory.values.tolist()
        probs = knn_probs(queries, keys, values, memory.k, memory.t, vocab)
    return probs.reshape(*states.shape[:-1], vocab)


def mixture(logits: Tensor, states: Tensor, memory: Any, lmbda: float) -> Array:
    """log P(w|c), (..., V), from a plain model's logits and states and a memory's raw contents."""
    return mixture_of(logits, [(states, memory, lmbda)])


def mixture_of(logits: Tensor, parts: list[tuple[Tensor, Any, float]]) -> Array:
    """The same of several memories: (states, memory, λ) of each."""
    lm = np.exp(log_softmax(logits.double().numpy()))
    mixed = (1 - sum(lmbda for _, _, lmbda in parts)) * lm
    for states, memory, lmbda in parts:
        probs = memory_probs(states, memory, logits.shape[-1])
        mixed = mixed + lmbda * probs.reshape(lm.shape)  # OPT captures (B·T, D)
    return np.log(mixed)


def nll(log_probs: Array, labels: Tensor, ignored: int = -100) -> float:
    """Mean −log P of the next label, over labels that count: (B, T, V), (B, T)."""
    total, count = 0.0, 0
    for row, text in zip(log_probs, labels.tolist(), strict=True):
        for position, label in enumerate(text[1:]):
            if label != ignored:
                total -= row[position, label]
                count += 1
    return total / count
