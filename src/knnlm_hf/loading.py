"""Models and tokenizers that are given by path or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knnlm_hf.errors import PersistenceError, first_line


def loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and tokenizer, loaded where they are given by path or Hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(model) if isinstance(model, str | Path) else None
    if source is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise PersistenceError(
                f"{source}: no causal language model: {first_line(error)}"
            ) from error
    if isinstance(tokenizer, str | Path):
        try:
            return model, AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError) as error:
            raise PersistenceError(f"{tokenizer}: no tokenizer: {first_line(error)}") from error
    if source is not None and tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):  # a corpus of token ids needs none
            tokenizer = None
    return model, tokenizer
