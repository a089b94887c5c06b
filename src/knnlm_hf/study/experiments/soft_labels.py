"""Row 14: whether it is kNN's soft distribution that a model should have been trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from knnlm_hf import capture
from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import knn_log_probs, mix_distributions
from knnlm_hf.memory import KNNMemory
from knnlm_hf.study import language_models, retrieval
from knnlm_hf.study.cost import evaluated, forward_seconds, search_seconds
from knnlm_hf.study.language_models import TrainedLM
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.lm_training import LMBatch
from knnlm_hf.study.measure import measure
from knnlm_hf.study.outcome import UNDECIDED, Outcome
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import no_gain

_SOME = 4096  # distributions of the teacher held at a time


def soft_labels(study: Study) -> Outcome:
    """Soft labels: a fresh model trained on a distribution.

    Row: 14

    Section: 6

    Hypothesis: is kNN-LM better because its distribution is softer than the next token alone, so
    that a model could be trained on it? Then a fresh model would gain by being trained on what the
    model, or kNN-LM, says of the training text.

    Finding: no gain.
    """
    layer = study.layers[0]
    knn = measure(
        "kNN-LM",
        retrieval.scores(study, "valid", layer=layer),
        retrieval.scores(study, "test", layer=layer),
    )
    hard = language_models.twin(study)
    of_model = _student(study, "of-model", None, 0.0)
    lmbda = round(knn.tuned.lmbda, 4)
    memory = retrieval.memory(study, round(knn.tuned.temperature, 6), layer)
    of_knn = _student(study, "of-knn", memory, lmbda)
    students = {"the next token": hard, "the model's": of_model, "kNN-LM's": of_knn}
    seen = {name: language_models.evaluation(study, "test", one) for name, one in students.items()}
    base = study.evaluation("test")
    gains = {
        name: language_models.ratio(study, seen[name], seen["the next token"])
        for name in ("the model's", "kNN-LM's")
    }
    rows: list[dict[str, Any]] = []
    for name, one in students.items():
        of_base = language_models.ratio(study, seen[name], base)
        rows.append({
            "setting": f"trained on {name}", "tokens": len(base),
            "trained_tokens": one.tokens, "epochs": one.epochs,
            "base_perplexity": _perplexity(base.lm_log_probs),
            "perplexity": _perplexity(seen[name].lm_log_probs),
            "against_base": of_base.to_dict(),
            "against_next_token": gains[name].to_dict() if name in gains else None,
        })  # fmt: skip
    fair = language_models.has_converged(study, hard)
    best = min(gains.values(), key=lambda gain: gain.ratio)
    said = "; ".join(
        f"trained on {name} distribution a fresh model has {gain} of the perplexity of the one "
        "trained on the next token"
        for name, gain in gains.items()
    )
    why = "" if fair else "; it is far from the model's own perplexity, so this decides nothing"
    return Outcome(
        rows=rows,
        verdict=no_gain(best) if fair else UNDECIDED,
        sentence=(
            f"A fresh model trained on the next token ({hard}) has a perplexity of "
            f"{rows[0]['perplexity']:.2f}, where the model has {rows[0]['base_perplexity']:.2f}; "
            f"{said}{why}."
        ),
        comparisons={f"{name} against the next token": gain for name, gain in gains.items()},
    )


def cost(study: Study) -> float:
    """Seconds: three trainings, two of them with the teacher's own pass, one with searches."""
    recipe = LMRecipe()
    tokens_N, cut = language_models.budget(study, recipe)
    seen = len(tokens_N) * cut.epochs
    evaluations = 3 * 2 * forward_seconds(study, evaluated(study))
    training = 3 * language_models.seconds(study, recipe) + 2 * forward_seconds(study, seen)
    return training + search_seconds(study, seen) + evaluations


class SoftLabels:
    """The cross-entropy to a teacher: the model, or kNN-LM on it, of the windows of a stream.

    loss = −Σ_w P_teacher(w) · log P_student(w), in nats, meaned over the positions.

    Args:
        teacher: the study's model, in evaluation mode.
        memory: a kNN memory on the stream's datastore; None: the model's own distribution.
        lmbda: λ of the memory.
        entries_N: for each position of the stream, the entry that its state is the key of, which
            the teacher may not find; −1: none.
    """

    def __init__(
        self, teacher: Any, memory: KNNMemory | None, lmbda: float, entries_N: Tensor
    ) -> None:
        self.teacher, self.memory, self.lmbda, self.entries_N = teacher, memory, lmbda, entries_N
        layer = "final" if memory is None else memory.layer
        self.point = capture.find(teacher, layer)

    def __call__(self, student: Any, batch: LMBatch) -> Tensor:
        """The mean loss of a batch."""
        inputs_BT = batch.tokens[:, :-1]
        log_student_QV = student(input_ids=inputs_BT).logits.flatten(0, 1).float().log_softmax(-1)
        positions_BT = batch.starts[:, None] + torch.arange(inputs_BT.shape[1])
        entries_Q = self.entries_N[positions_BT].flatten()
        teacher_QV, states_QD = self._heard(inputs_BT)
        total = log_student_QV.new_zeros(())
        for part in torch.split(torch.arange(len(entries_Q)), _SOME):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            with torch.no_grad():
                labels_qV = self._labels(teacher_QV[rows], states_QD[rows], entries_Q[rows])
            total = total - (labels_qV * log_student_QV[rows]).sum()
        mean: Tensor = total / len(entries_Q)
        return mean

    @torch.no_grad()
    def _heard(self, inputs_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits (Q, V) and states (Q, D)."""
        self.teacher.eval()
        with capture.capturing(self.point) as ear:
            logits_BTV = self.teacher(input_ids=inputs_BT).logits
        states_BTD = ear.states(len(inputs_BT))
        if states_BTD is None:
            raise KNNLMError(f"the model's forward never reached its layer {self.point!r}")
        return logits_BTV.flatten(0, 1).float(), states_BTD.flatten(0, 1)

    def _labels(self, logits_qV: Tensor, states_qD: Tensor, entries_q: Tensor) -> Tensor:
        """(q, V) probabilities."""
        log_probs_qV = nn.functional.log_softmax(logits_qV, dim=-1)
        if self.memory is None:
            return log_probs_qV.exp()
        near = self.memory.search(states_qD, exclude=entries_q)
        knn_qV = knn_log_probs(
            near.similarity, near.tokens, self.memory.temperature, logits_qV.shape[1]
        )
        return mix_distributions(log_probs_qV, [knn_qV], [self.lmbda]).exp()


def entry_numbers(documents: list[Any]) -> Tensor:
    """(N,) int64: for each position of the stream the entry of its state, −1 for a last token.

    A document of n tokens has n − 1 entries: the state before each token but the first.
    """
    found, first = [np.empty(0, dtype=np.int64)], 0
    for part in documents:
        entries = max(0, len(part) - 1)
        found.append(np.arange(first, first + entries))
        found.append(np.full(min(1, len(part)), -1))
        first += entries
    return torch.from_numpy(np.concatenate(found))


def _student(study: Study, name: str, memory: KNNMemory | None, lmbda: float) -> TrainedLM:
    tokens_N, recipe = language_models.budget(study, LMRecipe())
    seed = study.settings.seed + 1  # that of the student of the next token
    inputs = {
        "seed": seed,
        "lmbda": lmbda,
        "k": None if memory is None else memory.k,
        "temperature": None if memory is None else memory.temperature,
        "store": None if memory is None else memory.store.digest,
    }
    entries_N = entry_numbers(study.text("train").documents)
    return language_models.trained(
        study, name, lambda: language_models.fresh(study, seed), replace(recipe, seed=seed),
        tokens_N=tokens_N, inputs=inputs,
        loss=lambda: SoftLabels(study.model, memory, lmbda, entries_N),
    )  # fmt: skip


def _perplexity(log_probs_N: Tensor) -> float:
    return float((-log_probs_N.double().mean()).exp())
