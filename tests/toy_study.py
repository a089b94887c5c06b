"""A study of a language whose best perplexities are known, of a model whose states are known.

The language: half of the tokens are drawn from a1, a2, b1, b2 at random, each is followed by its
word: X after a1 or a2, Y after b1 or b2. So half of the tokens are certain, the others cost log 4.

The model: without attention and feed-forward layers that do anything, so that its state (att) is
the token it reads, as a vector. a1 = −a2 and b1 = −b2: one row per word cannot say what
follows them, two can.
"""

from __future__ import annotations

import math

import numpy as np
import tiny
import torch

from knnlm_hf.study import Settings, Study

A1, A2, B1, B2, X, Y = range(6)
VOCAB, WIDTH = 6, 16


def language(tokens: int, seed: int) -> list[list[int]]:
    first = np.random.default_rng(seed).integers(4, size=tokens // 2)
    return [np.stack([first, np.where(first < 2, X, Y)], axis=1).reshape(-1).tolist()]


def model():
    found = tiny.gpt2(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=1)
    rows_VD = torch.zeros(VOCAB, WIDTH)
    for row, (axis, sign) in enumerate([(0, 1), (0, -1), (2, 1), (2, -1), (4, 1), (6, 1)]):
        rows_VD[row, axis], rows_VD[row, axis + 1] = sign, -sign  # of mean 0, as a norm makes it
    with torch.no_grad():
        for parameter in found.transformer.h.parameters():
            parameter.zero_()
        found.transformer.h[0].ln_2.weight.fill_(4)  # states of norm 4·√D: heads learn quickly
        found.transformer.wpe.weight.zero_()
        found.transformer.wte.weight.copy_(rows_VD)
        found.transformer.ln_f.weight.fill_(1e-3)  # its own prediction is next to uniform
    return found


def study(folder, **changes) -> Study:
    options = {"model": model(), "settings": Settings(k=16, resamples=200, **changes)}
    return Study(
        options.pop("model"), None, train=language(6000, 1), valid=language(1600, 2),
        test=language(1600, 3), folder=folder, show=False, **options,
    )  # fmt: skip


BEST = math.exp(math.log(4) / 2)
"""Perplexity of who knows the language."""
ONE_ROW = math.exp((math.log(4) + math.log(6)) / 2)
"""Of one row per word, at best: the logits after a1 are those after a2, negated, so that
p(X | a1) · p(X | a2) = 1 / (Σ exp(s) · Σ exp(−s)) ≤ 1/36: no better than chance."""
