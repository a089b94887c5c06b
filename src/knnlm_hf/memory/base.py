"""What the wrapper, scoring and saving know of a memory: five names, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from knnlm_hf.errors import DatastoreError, KNNLMError, PersistenceError

if TYPE_CHECKING:
    from knnlm_hf.datastore import DatastoreReader
    from knnlm_hf.memory.head import Head


@runtime_checkable
class Memory(Protocol):
    """A distribution over the vocabulary, given hidden states: the second term of the equation.

    A class that has these five names is a memory; it need not inherit from anything. It may also
    have `check_model(model)` and `check_tokenizer(tokenizer)`, raising `ModelMismatchError` for one
    that it was not made with, and `reading` and `size`, if it is to be shown the text before it is
    asked: see `CacheMemory`; with those two `finding(hidden)`, if it can search before that, which
    returns it with that done. What it takes to be saved with a model is said in `kinds.register`.
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
    """A memory from a memory, an open datastore, or the path or Hub id of a datastore or a head."""
    from knnlm_hf.datastore import DatastoreReader
    from knnlm_hf.memory.knn import KNNMemory

    if isinstance(source, str | Path):
        source = open_source(source)
    if isinstance(source, DatastoreReader):
        return KNNMemory(source)
    if isinstance(source, Memory):
        return source
    missing = [name for name in _NAMES if not hasattr(source, name)]
    raise KNNLMError(
        f"{type(source).__name__} is no memory (it lacks {', '.join(missing)}): "
        "expected a Datastore, the path of one, a KNNMemory or a head"
    )


def open_source(source: str | Path) -> DatastoreReader | Head:
    """Open the datastore or the trained head in a folder or a repository of the Hub.

    Raises:
        PersistenceError, DatastoreError: neither is there, or it is damaged.
    """
    from knnlm_hf.datastore import DatastoreReader
    from knnlm_hf.memory.head import Head
    from knnlm_hf.memory.head_files import is_head

    folder = Path(source).expanduser()
    if is_head(folder):
        return Head.from_pretrained(source)
    try:
        return DatastoreReader.open(source)
    except (PersistenceError, DatastoreError) as error:
        is_store = (folder / "manifest.json").is_file()
        if is_store or (folder.is_dir() and not (folder / "config.json").is_file()):
            raise
        try:
            return Head.from_pretrained(source)
        except PersistenceError as other:
            if str(other) == str(error):
                raise error from None
            both = f"neither a datastore ({error}) nor a head ({other})"
            raise PersistenceError(f"{source}: {both}") from other


_NAMES = ("layer", "hidden_size", "vocab_size", "log_probs", "token_log_probs")
