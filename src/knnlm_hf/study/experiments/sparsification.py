"""Row 11: whether it is the mask alone that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf.study.cost import evaluated, forward_seconds
from knnlm_hf.study.forward import forwards
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.retrieval import with_memory
from knnlm_hf.study.study import Split, Study
from knnlm_hf.study.verdicts import no_gain


def sparsification(study: Study) -> Outcome:
    """Sparsification of the model's own softmax.

    Row: 11

    Section: 6

    Hypothesis: does kNN help because its distribution is sparse? Then the model's own softmax, cut
    to its k largest words and renormalised, would help when it is interpolated with the whole.

    Finding: no gain for any k.
    """
    ks = [2**step for step in range(study.vocab_size.bit_length()) if 2**step < study.vocab_size]
    valid, test = _own(study, "valid", ks), _own(study, "test", ks)
    found = [
        measure(
            f"top {k}",
            with_memory(study.evaluation("valid"), truncated(*valid, ks, k)),
            with_memory(study.evaluation("test"), truncated(*test, ks, k)),
        )
        for k in ks
    ]
    rows = [
        one.row(top=k, against_base=against(study, one).to_dict())
        for one, k in zip(found, ks, strict=True)
    ]
    best: Measured = min(found, key=lambda one: one.tuned.perplexity)
    gain = against(study, best)
    base = best.test.base_perplexity
    return Outcome(
        rows=rows,
        verdict=no_gain(gain),
        sentence=(
            f"The best on valid is the {best.name}, λ {best.tuned.lmbda:.2f}: on test "
            f"{gain} of the model alone ({base:.2f}); a gain counts from half a percent."
        ),
        plots=[
            Plot(
                title="The model's own top k, interpolated with itself", x="k",
                y="perplexity (test)", log_x=True, level=base, level_name="model alone",
                series=[Series("interpolated", ks, [row["perplexity"] for row in rows])],
            )
        ],
        comparisons={f"{best.name} against the model": gain},
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds of one more pass over valid and test, and of sorting its distributions."""
    return 2 * forward_seconds(study, evaluated(study)) + evaluated(study) / 2000


def truncated(rank_N: Tensor, mass_NG: Tensor, lm_N: Tensor, ks: list[int], k: int) -> Tensor:
    """(N,) log-probability of each target in the softmax cut to its k largest words.

    log p(target) − log Σ of the k largest, and −inf where the target is not among them.

    Args:
        rank_N: how many words come before the target, likeliest first.
        mass_NG: (N, len(ks)) sum of the ks[g] largest probabilities.
        lm_N: log-probability of the target in the whole softmax.
        ks: the candidates.
        k: one of them.
    """
    cut_N = lm_N - mass_NG[:, ks.index(k)].clamp(max=1).log()
    return torch.where(rank_N < k, cut_N.clamp(max=0), -torch.inf)


def top_of(logits_NV: Tensor, targets_N: Tensor, ks: list[int]) -> tuple[Tensor, Tensor]:
    """Rank of each target, (N,) int32, and mass of the k likeliest words for each k, (N, G).

    Of equally likely words the one with the lower id comes first, so that no two share a rank.
    """
    own_N1 = logits_NV.gather(1, targets_N[:, None])
    is_lower_NV = torch.arange(logits_NV.shape[1]) < targets_N[:, None]
    rank_N = ((logits_NV > own_N1) | ((logits_NV == own_N1) & is_lower_NV)).sum(1).int()
    top_NK = logits_NV.softmax(1).topk(max(ks), dim=1).values
    return rank_N, top_NK.cumsum(1)[:, torch.tensor(ks) - 1]


def _own(study: Study, split: Split, ks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    evaluation = study.evaluation(split)

    def make(path: Path) -> None:
        heard = forwards(
            study.model, study.rows(split), [], batch_size=study.settings.batch_size,
            show=study.show,
        )  # fmt: skip
        parts = [top_of(one.logits, one.targets, ks) for one in heard]
        columns: dict[str, Any] = {
            "rank": torch.cat([rank for rank, _ in parts]),
            "mass": torch.cat([mass for _, mass in parts]),
        }
        save_file(columns, path)

    inputs = {"evaluation": evaluation.digest, "ks": ks}
    columns = load_file(study.keep("own_softmax", f"base-{split}", inputs, make))
    return columns["rank"], columns["mass"], evaluation.lm_log_probs
