"""The paper's three mask × score modes, on the same tokens: shared by rows 9 and 10."""

from __future__ import annotations

from dataclasses import dataclass

from knnlm_hf.scores import TokenScores
from knnlm_hf.study import retrieval
from knnlm_hf.study.cost import evaluated, exact_seconds, search_seconds
from knnlm_hf.study.search import Search
from knnlm_hf.study.study import Split, Study


@dataclass(frozen=True)
class Mode:
    """Who chooses the k neighbours, and whose similarities weigh them."""

    name: str
    search: Search
    real: bool


MODES = (
    Mode("index mask, index score", "codes", False),
    Mode("index mask, real score", "codes", True),
    Mode("real mask, real score", "exact", True),
)
SMALL, WHOLE = "5 %", "100 %"
PARTS = {SMALL: 0, WHOLE: None}
"""The two datastores of the paper's figure 5, as parts."""


def scores(study: Study, split: Split, mode: Mode, size: str) -> TokenScores:
    """The scores of a mode, on as many tokens as exact search of the whole datastore may cost."""
    layer = study.layers[0]
    return retrieval.scores(
        study, split, layer=layer, search=mode.search, real=mode.real, part=PARTS[size],
        tokens=retrieval.exact_tokens(study, layer),
    )  # fmt: skip


def scale(study: Study) -> float:
    """The temperature that plays the part of the paper's 1: what the self-check suggests.

    One for all modes and sizes, from the true distances of the whole datastore, so that best
    temperatures can be compared.
    """
    return retrieval.temperature(study, study.layers[0], "l2", "exact")


def cost(study: Study, share: float = 1.0) -> float:
    """Seconds of searching a share of the datastore by product quantiser and exactly."""
    queries = min(evaluated(study), study.settings.exact_comparisons / max(1, _entries(study)))
    return exact_seconds(study, queries, share) + 2 * search_seconds(study, queries)


def _entries(study: Study) -> int:
    return len(study.text("train"))
