"""Row 15: whether kNN is an ensemble like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores
from knnlm_hf.study import language_models, retrieval
from knnlm_hf.study.bigram import Bigrams
from knnlm_hf.study.cost import evaluated, index_seconds, search_seconds
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.study import Split, Study
from knnlm_hf.windows import Window

_SPLITS: tuple[Split, ...] = ("valid", "test")


def ensembling(study: Study) -> Outcome:
    """Ensembling: two seeds; two similarities; a bigram model.

    Row: 15

    Section: 6

    Hypothesis: does kNN help as any second model would, because their errors differ? Then two
    models of different seeds, kNN with l2 and with ip together, and kNN with a bigram model, would
    gain as much again.

    Finding: the gains are small.
    """
    layer = study.layers[0]
    twin = language_models.twin(study)
    l2 = {split: retrieval.scores(study, split, layer=layer) for split in _SPLITS}
    ip = {split: retrieval.scores(study, split, layer=layer, metric="ip") for split in _SPLITS}
    words = Bigrams(study.text("train").documents, study.vocab_size)
    second = {
        split: language_models.evaluation(study, split, twin).lm_log_probs for split in _SPLITS
    }
    pairs = {
        split: words.log_probs(before(study.rows(split)), study.evaluation(split).tokens)
        for split in _SPLITS
    }
    alone = {
        split: retrieval.with_memory(study.evaluation(split), second[split]) for split in _SPLITS
    }
    found = {
        "kNN": _measure("kNN-LM, l2", l2),
        "seeds": _measure("two seeds", alone),
        "similarities": _measure("kNN-LM, l2 + ip", {s: joined([l2[s], ip[s]]) for s in _SPLITS}),
        "bigram": _measure(
            "kNN-LM, l2 + bigram", {s: joined([l2[s]], [pairs[s]]) for s in _SPLITS}
        ),
    }  # fmt: skip
    knn = against(study, found["kNN"])
    added = {
        "seeds": against(study, found["seeds"]),
        "similarities": against(study, found["similarities"], found["kNN"]),
        "bigram": against(study, found["bigram"], found["kNN"]),
    }
    rows = [
        one.row(
            what=name, against_base=against(study, one).to_dict(),
            against_without=added[name].to_dict() if name in added else None,
        )
        for name, one in found.items()
    ]  # fmt: skip
    has_twin = language_models.has_converged(study, twin)
    judged = [gain for name, gain in added.items() if has_twin or name != "seeds"]
    why = "" if has_twin else f" (it saw {twin}, and is no match for the model yet)"
    base = found["kNN"].test.base_perplexity
    return Outcome(
        rows=rows,
        verdict=both(
            has_twin and all(gain.low > knn.high for gain in judged),
            any(gain.high < knn.low for gain in judged),
        ),
        sentence=(
            f"kNN takes the perplexity from {base:.2f} to {found['kNN'].perplexity:.2f} ({knn}); "
            f"a second model of another seed brings {added['seeds']}{why}, ip beside l2 "
            f"{added['similarities']}, a bigram model beside kNN {added['bigram']}; a gain is "
            "small where it is certainly less than kNN's own."
        ),
        plots=[_plot(found, base)],
        comparisons={"kNN against the model": knn}
        | {f"{name} against without": gain for name, gain in added.items()},
    )


def cost(study: Study) -> float:
    """Seconds: a second model, which row 14 needs too, and the searches by ip."""
    searches = index_seconds(study) + search_seconds(study, evaluated(study))
    return language_models.seconds(study, LMRecipe()) + searches


def joined(found: Sequence[TokenScores], log_probs: Sequence[Tensor] = ()) -> TokenScores:
    """Scores of the same tokens with all the memories of each, and others of known log p."""
    memories = [memory for one in found for memory in one.memories]
    memories += [Evidence(scores=log_probs_N) for log_probs_N in log_probs]
    return replace(found[0], memories=tuple(memories), lmbdas=(0.0,) * len(memories))


def before(rows: Sequence[Window]) -> Tensor:
    """(N,) int32, the token before each prediction that is new in these windows, in order."""
    return torch.from_numpy(np.concatenate([row.tokens[-row.new :] for row in rows]))


def _measure(name: str, scores: dict[Split, TokenScores]) -> Measured:
    return measure(name, scores["valid"], scores["test"])


def _plot(found: dict[str, Measured], base: float) -> Plot:
    names = [one.name for one in found.values()]
    return Plot(
        title="Ensembles", x="", y="perplexity (test)", kind="bar",
        level=base, level_name="model alone",
        series=[Series("interpolated", names, [one.perplexity for one in found.values()])],
    )  # fmt: skip
