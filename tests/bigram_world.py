"""A language of two words and a model that knows any bigram table: every answer by hand.

The model's states depend on the current token alone, so that the nearest keys are those of the same
token, and a kNN model is the bigram distribution of its datastore.

    text     a a a a a a a a a b   a a a a a a a a a b   …
    after a  a with 8/9, b with 1/9;   after b  always a
"""

from __future__ import annotations

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel

A, B, VOCAB = 2, 3, 4
NEVER = -30.0
BIGRAM = math.exp((8 * math.log(9 / 8) + math.log(9)) / 10)
"""Perplexity of the text under its own bigram distribution, 1.3688."""


def text(tokens: int) -> list[int]:
    return ([A] * 9 + [B]) * (tokens // 10)


def table(a_after_a: float, a_after_b: float) -> torch.Tensor:
    """Log-probabilities of the next token, (V, V): row = current token."""
    rows = torch.full((VOCAB, VOCAB), NEVER)
    for current, p in ((A, a_after_a), (B, a_after_b)):
        rows[current, A] = math.log(p) if p else NEVER
        rows[current, B] = math.log(1 - p) if p < 1 else NEVER
    return rows


def model(log_probs_VV: torch.Tensor) -> GPT2LMHeadModel:
    """A GPT-2 that gives exactly these probabilities."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = GPT2LMHeadModel(config).eval()
    block = made.transformer.h[0]
    with torch.no_grad():
        for weight in (block.attn.c_proj, block.mlp.c_proj):
            weight.weight.zero_()
            weight.bias.zero_()
        made.transformer.wpe.weight.zero_()
        made.transformer.wte.weight.copy_(3 * torch.eye(VOCAB, 16))
        final_VD = made.transformer(torch.arange(VOCAB)[:, None]).last_hidden_state[:, 0]
        # In float64, by the pseudo-inverse: lstsq in float32 is another one from call to call.
        made.lm_head.weight.copy_((torch.linalg.pinv(final_VD.double()) @ log_probs_VV.double()).T)
    return made


def uniform() -> GPT2LMHeadModel:
    return model(table(0.5, 0.5))


def knowing() -> GPT2LMHeadModel:
    return model(table(8 / 9, 1.0))
