"""Language models that a study trains: each once, kept as its parameters, from one budget.

Shape suffixes: N token, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf.memory.checkpoint import remove_checkpoint
from knnlm_hf.study.bootstrap import Comparison, compare
from knnlm_hf.study.cost import forward_seconds
from knnlm_hf.study.forward import Evaluation
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.lm_training import Loss, mean_loss, next_token_loss, stream, train_lm
from knnlm_hf.study.study import Split, Study
from knnlm_hf.study.workspace import read_json, write_json

_STEPS = 250  # of a small budget, by which its batches are sized
_MEASURED = 100_000  # tokens, at most, whose loss is measured while training and afterwards
_CONVERGED = 1.1
"""A fresh model whose perplexity is at most so many times the base's had its chance."""


@dataclass(frozen=True)
class TrainedLM:
    """A language model of the study."""

    name: str
    model: Any
    train_loss: float
    """Mean −log p of what it was trained on, in nats, afterwards, without dropout."""
    base_loss: float
    """The same of the study's own model."""
    tokens: int
    """Tokens of the training text that it saw."""
    epochs: int
    """How often."""

    def __str__(self) -> str:
        passes = "once" if self.epochs == 1 else f"{self.epochs} times"
        return f"{self.tokens:,} tokens, {passes}"


def fresh(study: Study, seed: int) -> Any:
    """A model of the same class and configuration as the study's, with new random weights."""
    torch.manual_seed(seed)
    model = type(study.model)(copy.deepcopy(study.model.config))
    return model.to(study.model.device, torch.float32)


def copied(study: Study) -> Any:
    """The study's model with weights of its own."""
    return copy.deepcopy(study.model).float()


def budget(study: Study, recipe: LMRecipe) -> tuple[Tensor, LMRecipe]:
    """The part of the training text that a language model is trained on, and how.

    The recipe's epochs over all of it where `lm_tokens` allows; else fewer, and at last less text.
    """
    tokens_N = stream(study.text("train").documents)
    most = study.settings.lm_tokens
    epochs, examples = recipe.epochs, len(tokens_N)
    if most is not None and most < epochs * examples:
        epochs = min(epochs, max(1, round(most / examples)))
        examples = min(examples, max(2, most // epochs))
    rows = epochs * examples / (study.window * _STEPS)
    batch = min(recipe.batch_size, max(1, 2 ** int(math.log2(max(1.0, rows)))))
    seed = study.settings.seed
    return tokens_N[:examples], replace(recipe, epochs=epochs, batch_size=batch, seed=seed)


def trained(
    study: Study,
    name: str,
    start: Callable[[], Any],
    recipe: LMRecipe,
    *,
    tokens_N: Tensor,
    inputs: dict[str, Any] | None = None,
    loss: Callable[[], Loss] | None = None,
) -> TrainedLM:
    """A language model, trained once; a killed training continues.

    Args:
        study: whose validation text (its beginning) stops it, where the recipe has patience.
        name: for people.
        start: makes the model with its initial weights.
        recipe: how, see `budget`.
        tokens_N: what it is trained on.
        inputs: plain data, all else that it depends on: the seed of its weights, its loss.
        loss: makes what it is trained on in place of the next token.
    """
    held = min(_MEASURED, study.settings.eval_tokens or _MEASURED)
    everything = (inputs or {}) | {
        "model": study.model_digest, "text": study.text("train").digest, "name": name,
        "tokens": len(tokens_N), "recipe": asdict(recipe), "window": study.window,
        "valid": None if recipe.patience is None else [study.text("valid").digest, held],
    }  # fmt: skip

    def make(folder: Path) -> None:
        model = start()
        valid_N = None if recipe.patience is None else stream(study.text("valid").documents)[:held]
        train_lm(
            model, tokens_N, valid_N, recipe, window=study.window,
            loss=next_token_loss if loss is None else loss(),
            checkpoint=folder / "checkpoint", progress=study.show,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()},
            folder / "model.safetensors",
        )
        losses = [
            mean_loss(
                one, tokens_N[:_MEASURED], window=study.window,
                batch_size=study.settings.batch_size,
            )
            for one in (model, study.model)
        ]  # fmt: skip
        write_json(folder / "losses.json", losses)

    path = study.workspace.keep("language_models", name, everything, make, resumes=True)
    remove_checkpoint(path / "checkpoint")
    model = start()
    found = load_file(path / "model.safetensors")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(found[parameter_name])
    train_loss, base_loss = read_json(path / "losses.json")
    return TrainedLM(path.name, model.eval(), train_loss, base_loss, len(tokens_N), recipe.epochs)


def evaluation(study: Study, split: Split, trained: TrainedLM) -> Evaluation:
    """A split as a trained model sees it: the same tokens as the study's own evaluation."""
    return study.evaluation(split, model=trained.model, name=trained.name)


def ratio(study: Study, a: Evaluation, b: Evaluation) -> Comparison:
    """The perplexity of one model alone as a multiple of another's."""
    return compare(
        a.lm_log_probs, b.lm_log_probs, a.documents,
        seed=study.settings.seed, resamples=study.settings.resamples,
    )  # fmt: skip


def has_converged(study: Study, trained: TrainedLM) -> bool:
    """Whether a fresh model is about as good on valid as the study's."""
    of_base = ratio(study, evaluation(study, "valid", trained), study.evaluation("valid"))
    return of_base.ratio < _CONVERGED


def twin(study: Study) -> TrainedLM:
    """A fresh model of another seed, trained on the next tokens as language models are."""
    tokens_N, recipe = budget(study, LMRecipe())
    seed = study.settings.seed + 1
    return trained(
        study, "twin", lambda: fresh(study, seed), replace(recipe, seed=seed),
        tokens_N=tokens_N, inputs={"seed": seed},
    )  # fmt: skip


def seconds(study: Study, recipe: LMRecipe) -> float:
    """What training a language model takes on two cores; an estimate."""
    tokens_N, recipe = budget(study, recipe)
    return forward_seconds(study, len(tokens_N) * recipe.epochs, training=True)
