"""What the examples begin with: a model and three lists of texts, with or without a download."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf.demo.texts import docstrings, reference, split


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of a causal model [a small one, trained]")
    parser.add_argument("--corpus", help="text file, or Hub id of a dataset [Python's reference]")
    return parser


def load_model(name: str | None = None, steps: int = 380) -> tuple[Any, Any]:
    """A model and its tokenizer; None: a small GPT-2, trained for a minute on docstrings."""
    if name is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(name)
        return model.eval(), AutoTokenizer.from_pretrained(name)
    from knnlm_hf.demo.train import train_model, train_tokenizer

    texts = docstrings()
    tokenizer = train_tokenizer(texts)
    return train_model(texts, tokenizer, steps=steps), tokenizer


def load_texts(corpus: str | None = None) -> tuple[list[str], list[str], list[str]]:
    """Texts to build from, to tune on and to report; None: a part of Python's reference."""
    if corpus is None:
        return split(reference()[20:80])
    if Path(corpus).is_file():
        texts = Path(corpus).read_text(encoding="utf-8").split("\n\n")
    else:
        from datasets import load_dataset

        texts = load_dataset(corpus, split="train")["text"]
    return split([text for text in texts if text.strip()])
