"""A small GPT-2 in the place of one from the Hub, for pages and examples: nothing is downloaded.

A folder named `gpt2` in the current directory is what `from_pretrained("gpt2")` loads.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

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


def save(folder: Path) -> None:
    """Train it in seconds on docstrings of the standard library, and save it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = ["\n\n".join(_of_module(library / f"{name}.py")) for name in _MODULES]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, _VOCABULARY, show_progress=False, special_tokens=[_END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token=_END, eos_token=_END, pad_token=_END
    )
    torch.manual_seed(0)
    options: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=_WINDOW, n_embd=48, n_layer=2, n_head=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **options,
        )
    )  # fmt: skip
    tokens = torch.tensor([token for row in tokenizer(texts)["input_ids"] for token in row])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(_STEPS):
        starts_B1 = torch.randint(len(tokens) - _WINDOW, (_BATCH, 1))
        batch_BT = tokens[starts_B1 + torch.arange(_WINDOW)]
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
