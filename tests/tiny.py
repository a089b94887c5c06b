"""A tiny random GPT-2, a tiny corpus, a tokenizer: everything in memory, nothing downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB = 61
WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(2, VOCAB))]


def gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.4,
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**{**options, **changes})).eval()


def corpus(documents: int = 6, seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Token lists of many lengths, 0 and 1 among them; repeated phrases, so that kNN helps."""
    generator = torch.Generator().manual_seed(seed)
    phrases = torch.randint(VOCAB, (5, 9), generator=torch.Generator().manual_seed(99)).tolist()
    items: list[list[int]] = [[], [7]]
    for _ in range(documents):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        picks = torch.randint(5, (length // 9 + 1,), generator=generator).tolist()
        items.append([token for pick in picks for token in phrases[pick]][:length])
    return items


def tokenizer(reverse: bool = False) -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word: <eos> <unk> w2 … w60, or the w's in reverse."""
    words = [*WORDS[:2], *WORDS[:1:-1]] if reverse else WORDS
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )


def text(items: list[list[int]]) -> list[str]:
    return [" ".join(WORDS[token] for token in item) for item in items]


class Keys:
    """The smallest `KeyRows`: a tensor in memory."""

    def __init__(self, rows):
        self.rows = rows
        self.dim = rows.shape[1]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, ids):
        return self.rows[ids]

    def blocks(self, size):
        for first in range(0, len(self.rows), size):
            yield first, self.rows[first : first + size]
