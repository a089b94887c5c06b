"""What work costs on two cores, so that a run can say how long it may take: an estimate only."""

from __future__ import annotations

from knnlm_hf.study.study import Study

_LM_FLOPS = 4e10
"""Multiply-adds a second in a language model's matrix products, both cores."""
_SEARCHES = 2500
"""Approximate searches a second at k=1024, true scores from the keys included."""
_EXACT_FLOPS = 4e10
"""Multiply-adds a second of exact search."""
_INDEXED = 80_000
"""Entries indexed a second."""


def forward_seconds(study: Study, tokens: float, *, training: bool = False) -> float:
    """Seconds of a language model's pass over so many tokens; three times as many in training."""
    parameters = sum(int(p.numel()) for p in study.model.parameters())
    return tokens * parameters * (3 if training else 1) / _LM_FLOPS


def evaluated(study: Study) -> int:
    """Tokens scored of valid and test together."""
    limit = study.settings.eval_tokens
    sizes = [len(study.text("valid")), len(study.text("test"))]
    return sum(size if limit is None else min(size, limit) for size in sizes)


def store_seconds(study: Study) -> float:
    """Seconds of building a datastore: twice the tokens, but no last sublayer, no output layer."""
    return 0.4 * forward_seconds(study, len(study.text("train")))


def index_seconds(study: Study) -> float:
    """Seconds of building an index over all entries."""
    return len(study.text("train")) / _INDEXED


def search_seconds(study: Study, queries: float) -> float:
    """Seconds of approximate searches."""
    return queries / _SEARCHES


def exact_seconds(study: Study, queries: float, share: float = 1.0) -> float:
    """Seconds of exact searches in a share of the datastore."""
    width: int = study.model.config.get_text_config(decoder=True).hidden_size
    return queries * share * len(study.text("train")) * width / _EXACT_FLOPS
