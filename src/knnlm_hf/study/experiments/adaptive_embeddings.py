"""Row 5: whether the words that need it should have more embeddings than others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.memory.multi_embedding import rows_by_frequency, rows_by_loss
from knnlm_hf.study import heads
from knnlm_hf.study.cost import forward_seconds
from knnlm_hf.study.experiments.number_of_embeddings import measured
from knnlm_hf.study.measure import Measured, against
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import no_gain

CHOICES = [(3, "frequency"), (3, "training loss"), (5, "frequency"), (5, "training loss")]
"""Rows in all, as a multiple of V, and what they are given by."""


def adaptive_embeddings(study: Study) -> Outcome:
    """Embeddings by frequency or by training loss.

    Row: 5

    Section: 4

    Hypothesis: are n embeddings for every word wasted on the rare and easy ones? Then as many rows
    in all, given by a word's frequency or by its total training loss, would do better.

    Finding: no clear win over the same number of rows for every word, with about 3V and about 5V
    rows in all.
    """
    layer = study.layers[0]
    choices = heads.some(study, CHOICES)
    found = [_head(study, layer, times, by) for times, by in choices]
    equal = {times: measured(study, layer, times) for times, _ in choices}
    gains = [against(study, one, equal[t]) for one, (t, _) in zip(found, choices, strict=True)]
    rows = [
        one.row(
            rows=times, by=by, against_base=against(study, one).to_dict(),
            against_equal=gain.to_dict(),
        )
        for one, gain, (times, by) in zip(found, gains, choices, strict=True)
    ]  # fmt: skip
    rows += [
        one.row(rows=times, by="equal", against_base=against(study, one).to_dict())
        for times, one in equal.items()
    ]
    number = min(range(len(found)), key=lambda i: found[i].tuned.perplexity)
    best, gain = found[number], gains[number]
    same = equal[choices[number][0]]
    every = [*found, *equal.values()]
    return Outcome(
        rows=rows,
        verdict=no_gain(gain, fair=not heads.is_cut(study)),
        sentence=(
            f"The best on valid is {best.name}, with {best.perplexity:.2f} on test; as many rows "
            f"given equally have {same.perplexity:.2f} ({gain}); a gain counts from half a "
            f"percent; {heads.said_of(study)}."
        ),
        plots=[
            Plot(
                title="Rows by frequency, by loss, equally", x="", y="perplexity (test)",
                kind="bar", level=best.test.base_perplexity, level_name="model alone",
                series=[
                    Series(
                        "interpolated", [one.name for one in every],
                        [one.perplexity for one in every],
                    )
                ],
            )
        ],
        comparisons={f"{best.name} against {same.name}": gain},
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: a head for each choice, and the model's loss on what they are trained on."""
    rows = sum(times for times, _ in heads.some(study, CHOICES)) * study.vocab_size
    seen = sum(row.new for row in heads.train_rows(study))
    return heads.seconds(study, rows) + 2 * forward_seconds(study, seen)


def by_frequency(counts_V: Tensor, rows: int) -> Tensor:
    """(V,) rows by the logarithm of a word's count, to the base that gives about `rows` in all."""
    low, high = 1.0001, float(max(2, int(counts_V.max()))) + 1
    for _ in range(50):
        base = (low * high) ** 0.5
        if int(rows_by_frequency(counts_V, base).sum()) > rows:
            low = base
        else:
            high = base
    return rows_by_frequency(counts_V, high)


def total_loss(tokens_n: Tensor, log_probs_n: Tensor, vocab_size: int) -> Tensor:
    """(V,) float64, −log P_LM of a word summed over its occurrences."""
    losses_V = torch.zeros(vocab_size, dtype=torch.float64)
    return losses_V.index_add_(0, tokens_n.long(), -log_probs_n.double())


def _head(study: Study, layer: str, times: int, by: str) -> Measured:
    rows = times * study.vocab_size
    if by == "frequency":
        parts = study.text("train").documents
        counts = sum(np.bincount(part, minlength=study.vocab_size) for part in parts)
        rows_V = by_frequency(torch.from_numpy(np.asarray(counts)), rows)
    else:
        entries = heads.entries(study, layer)
        tokens_n = entries.values[entries.nth_live(torch.arange(entries.live))]
        rows_V = rows_by_loss(
            total_loss(tokens_n, heads.lm_log_probs(study), study.vocab_size), rows
        )
    name = f"{times}V rows by {by}"
    trained = heads.trained(
        study, layer, "multi_embedding", name.replace(" ", "-"), rows_per_token=rows_V
    )
    return heads.measured(study, f"{name}, {int(rows_V.sum()):,} in all", trained)
