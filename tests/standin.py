"""A small GPT-2 in the place of one from the Hub, for pages and examples: nothing is downloaded.

A folder named `gpt2` in the current directory is what `from_pretrained("gpt2")` loads. It is the
same on every run, since pages print its figures: ties of the tokenizer's merges are broken by the
alphabet, not by a hash table, and training is in float64, where the order of a sum, which follows
threads and instruction sets, is not felt 150 steps later.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from knnlm_hf.demo.texts import _of_module

_MODULES = ("argparse", "difflib", "typing", "statistics", "random", "tarfile", "datetime")
_VOCABULARY, _WINDOW, _BATCH, _STEPS = 1024, 64, 8, 150
_END = "<|endoftext|>"


def shared(factory: pytest.TempPathFactory) -> Path:
    """The stand-in's folder, made once for all workers of a test run."""
    home = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent  # each worker has a folder of its own in it
    with FileLock(home / "standin.lock"):
        if not (home / "standin").is_dir():
            save(home / "making")
            (home / "making").rename(home / "standin")
    return home / "standin"


def save(folder: Path, steps: int = _STEPS) -> None:
    """Train it in seconds on docstrings of the standard library, and save it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = ["\n\n".join(_of_module(library / f"{name}.py")) for name in _MODULES]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    options: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=_WINDOW, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    tokens = torch.tensor([token for row in tokenizer(texts)["input_ids"] for token in row])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        starts_B1 = torch.randint(len(tokens) - _WINDOW, (_BATCH, 1))
        batch_BT = tokens[starts_B1 + torch.arange(_WINDOW)]
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.float().eval().generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(ByteLevel.alphabet())
    joined = merges(texts, _VOCABULARY - len(alphabet) - 1)
    tokens = dict.fromkeys([_END, *alphabet, *("".join(pair) for pair in joined)])
    backend = ByteLevelBPETokenizer({token: i for i, token in enumerate(tokens)}, joined)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token=_END, eos_token=_END, pad_token=_END
    )


def merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: `count` times, join the most frequent pair; of equals, the first one.

    Words that occur once are left out: they are half of the work, and decide little.
    """
    split = ByteLevel(add_prefix_space=False).pre_tokenize_str
    words = Counter(word for text in texts for word, _ in split(text))
    pieces = [(list(word), times) for word, times in words.items() if times > 1]
    found: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, times in pieces:
            for pair in pairwise(parts):
                pairs[pair] += times
        found.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for parts, _ in pieces:
            _join(parts, *found[-1])
    return found


def _join(parts: list[str], first: str, second: str) -> None:
    """Join each `first` and `second` that stand side by side, from the left."""
    at = 0
    while first in parts[at:-1]:
        at = parts.index(first, at) + 1
        if parts[at] == second:
            parts[at - 1 : at + 1] = [first + second]
