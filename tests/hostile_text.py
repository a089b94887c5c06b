"""A tiny model and datastore whose words are attacks on a page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory

ATTACKS = [
    "</script><script>alert(1)</script>", "<img/src=x/onerror=alert(2)>", '"><b/onclick="alert(3)',
    "'onmouseover='alert(4)", "<!--", "-->", "]]>", "$title", "${text}", "{style}", "&lt;",
    "\\u003c", "\u202eesrever", "\u2028", "a\rb", "c\0d", "<style>*{display:none}</style>",
    "javascript:alert(5)",
]  # fmt: skip
WORDS = [*tiny.WORDS[:2], *ATTACKS, *tiny.WORDS[2 + len(ATTACKS) :]]
_OF_ATTACKS = list(range(2, 2 + len(ATTACKS)))
TEXT = [*[token for item in tiny.corpus(4, seed=5) for token in item][:110], *_OF_ATTACKS]
TITLE = '<b>"My" & text</b>'


def tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny.tokenizer`, with WORDS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def knn(folder: Path) -> Any:
    """A kNN model; its store is made in `folder`."""
    corpus = [*tiny.corpus(9), _OF_ATTACKS, _OF_ATTACKS]
    store = Datastore.build(tiny.gpt2(), corpus, folder, tokenizer=tokenizer(), progress=False)
    return KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store, k=12), 0.4)
