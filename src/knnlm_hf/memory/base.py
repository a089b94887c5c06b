"""What the wrapper, scoring and saving know of a memory: five names, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from knnlm_hf.errors import KNNLMError


@runtime_checkable
class Memory(Protocol):
    """A distribution over the vocabulary, given hidden states: the second term of the equation.

    A class that has these five names is a memory; it need not inherit from anything. It may also
    have `check_model(model)` and `check_tokenizer(tokenizer)`, raising `ModelMismatchError` for one
    that it was not made with, and `settings()`, plain data from which `save_pretrained` can restore
    it.
    """

    @property
    def layer(self) -> str:
        """The captured representation it expects: `att`, `ffn`, `final` or a module path."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every token: (..., D) → (..., V) float32.

        −inf where a token is impossible; a row of only −inf says "no opinion" (no neighbour at
        all), and the mixture then is the language model alone.
        """

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token per state: (..., D), (...) → (...) float32."""


def as_memory(source: Any) -> Memory:
    """A memory from a memory, an open datastore, or the path or Hub id of a datastore."""
    from knnlm_hf.datastore import DatastoreReader
    from knnlm_hf.memory.knn import KNNMemory

    if isinstance(source, str | Path | DatastoreReader):
        return KNNMemory(source)
    if isinstance(source, Memory):
        return source
    missing = [name for name in _NAMES if not hasattr(source, name)]
    raise KNNLMError(
        f"{type(source).__name__} is no memory (it lacks {', '.join(missing)}): "
        "expected a Datastore, the path of one, a KNNMemory or a head"
    )


_NAMES = ("layer", "hidden_size", "vocab_size", "log_probs", "token_log_probs")
