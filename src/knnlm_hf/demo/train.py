"""A small GPT-2, trained from nothing in about a minute on two cores."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from knnlm_hf.progress import track

_VOCABULARY, _WINDOW, _BATCH = 4096, 128, 16
_END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most so many tokens: it can spell any text."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocabulary, show_progress=False, special_tokens=[_END])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend._tokenizer, bos_token=_END, eos_token=_END, pad_token=_END
    )
    return tokenizer


def train_model(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int = 0
) -> GPT2LMHeadModel:
    """Next-token training on random windows of `texts`: AdamW, cosine schedule, seeded."""
    torch.manual_seed(seed)
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=_WINDOW, n_embd=192, n_layer=4, n_head=6,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )
    )  # fmt: skip
    rows = tokenizer(texts)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "training", total=steps, unit="steps"):
        starts = torch.randint(len(tokens) - _WINDOW, (_BATCH, 1), generator=generator)
        batch_BT = tokens[starts + torch.arange(_WINDOW)]
        loss = model(input_ids=batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained: GPT2LMHeadModel = model.eval()
    return trained
