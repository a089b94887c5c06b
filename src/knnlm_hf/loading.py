"""Models and tokenizers that are given by path or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knnlm_hf.errors import PersistenceError, first_line
from knnlm_hf.identity import without_adapters


def loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and tokenizer, loaded where they are given by path or Hub id.

    Of a PEFT model the model inside, adapters included.
    """
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
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError) as error:
            raise PersistenceError(f"{tokenizer}: no tokenizer: {first_line(error)}") from error
    if source is not None and tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):  # a corpus of token ids needs none
            tokenizer = None
    return without_adapters(model), tokenizer
