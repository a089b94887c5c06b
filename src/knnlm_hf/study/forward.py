"""One pass of a model over text: what an evaluation keeps of it, for every layer at once.

Shape suffixes: N token, V vocabulary, D hidden dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf import capture
from knnlm_hf.errors import KNNLMError
from knnlm_hf.progress import track
from knnlm_hf.windows import Batch, Tokens, Window, batched, windows


@dataclass(frozen=True)
class Heard:
    """What a model says of the new predictions of one batch of windows: N of them, in order."""

    logits: Tensor
    """(N, V) float32."""
    targets: Tensor
    """(N,) int64."""
    states: dict[str, Tensor]
    """(N, D) by layer, as the model gives them."""
    documents: Tensor
    """(N,) int32."""
    context: Tensor
    """(N,) int32, how many tokens the model saw before the prediction, in its window."""

    @property
    def log_probs(self) -> Tensor:
        """(N,) float32, log P_LM of each target."""
        own_N = self.logits.gather(1, self.targets[:, None])[:, 0]
        return own_N - self.logits.logsumexp(1)


def spread(rows: Sequence[Window], tokens: int | None) -> list[Window]:
    """Windows that hold about `tokens` new predictions together, spread evenly over `rows`.

    Window i is taken where ⌊(i+1)·share + ½⌋ > ⌊i·share + ½⌋, share = tokens ÷ all predictions:
    at least one, and all of them where `tokens` is None or enough.
    """
    total = sum(row.new for row in rows)
    if tokens is None or tokens >= total:
        return list(rows)
    # subtle: from half a step on, so that a small sample does not lie at the very beginning.
    share = tokens / total
    taken = [int((i + 1) * share + 0.5) > int(i * share + 0.5) for i in range(len(rows))]
    found = [row for row, take in zip(rows, taken, strict=True) if take]
    return found or [rows[len(rows) // 2]]


def rows_of(documents: Sequence[Tokens], window: int, stride: int) -> list[Window]:
    """All windows of the documents of a split."""
    return [
        row
        for number, tokens in enumerate(documents)
        for row in windows(tokens, number, window, stride)
    ]


@torch.no_grad()
def forwards(
    model: Any, rows: Sequence[Window], layers: Sequence[str], *, batch_size: int, show: bool = True
) -> Iterator[Heard]:
    """Run a model over windows, in evaluation mode, and yield what it says of each batch.

    Args:
        model: a causal language model.
        rows: windows, see `rows_of` and `spread`.
        layers: whose states to keep, see `capture.find`.
        batch_size: windows per forward pass.
        show: a progress bar on stderr.
    """
    points = {layer: capture.find(model, layer) for layer in layers}
    options = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    total = sum(row.new for row in rows)
    groups = batched(rows, batch_size)
    was_training = model.training
    model.eval()
    try:
        for batch in track(groups, "evaluating", lambda b: b.new, total=total, show=show):
            yield _heard(model, batch, points, options)
    finally:
        model.train(was_training)


def _heard(
    model: Any, batch: Batch, points: dict[str, capture.CapturePoint], options: dict[str, Any]
) -> Heard:
    given = dict(options)
    if batch.attention_mask is not None:
        given["attention_mask"] = batch.attention_mask.to(model.device)
    with ExitStack() as stack:
        ears = {layer: stack.enter_context(capture.capturing(p)) for layer, p in points.items()}
        logits_BTV = model(input_ids=batch.input_ids.to(model.device), **given).logits
    is_new_BT = batch.is_new
    states = {}
    for layer, ear in ears.items():
        states_BTD = ear.states(len(is_new_BT))
        if states_BTD is None:
            raise KNNLMError(f"the model's forward never reached its layer {layer!r}")
        states[layer] = states_BTD[is_new_BT.to(states_BTD.device)].cpu()
    row_N, column_N = is_new_BT.nonzero(as_tuple=True)
    return Heard(
        logits=logits_BTV[is_new_BT.to(logits_BTV.device)].float().cpu(),
        targets=batch.targets[is_new_BT],
        states=states,
        documents=batch.documents.int()[row_N],
        context=column_N.int() + 1,
    )


@dataclass(frozen=True)
class Evaluation:
    """A split as one model sees it: N predicted tokens, in corpus order."""

    lm_log_probs: Tensor
    """(N,) float32, log P_LM of the token."""
    tokens: Tensor
    """(N,) int32."""
    documents: Tensor
    """(N,) int32."""
    context: Tensor
    """(N,) int32, tokens that the model saw before it."""
    states: dict[str, Tensor]
    """(N, D) by layer: the queries."""
    digest: str = ""
    """Identifies the model, the text and the choice of tokens."""

    def __len__(self) -> int:
        return len(self.tokens)


def evaluate(
    model: Any, rows: Sequence[Window], layers: Sequence[str], *, batch_size: int, show: bool = True
) -> Evaluation:
    """Score windows with a model and keep its states of some layers."""
    heard = forwards(model, rows, layers, batch_size=batch_size, show=show)
    parts = [
        (h.log_probs, h.targets.int(), h.documents, h.context, *h.states.values()) for h in heard
    ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    states = dict(zip(layers, columns[4:], strict=True))
    return Evaluation(columns[0], columns[1], columns[2], columns[3], states)


_COLUMNS = ("lm_log_probs", "tokens", "documents", "context")


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as one safetensors file."""
    columns = {name: getattr(evaluation, name) for name in _COLUMNS}
    columns |= {f"states.{layer}": states for layer, states in evaluation.states.items()}
    save_file({name: column.contiguous() for name, column in columns.items()}, path)


def load_evaluation(path: Path) -> Evaluation:
    """Read what `save_evaluation` wrote."""
    columns = load_file(path)
    states = {name[7:]: column for name, column in columns.items() if name.startswith("states.")}
    return Evaluation(
        columns["lm_log_probs"], columns["tokens"], columns["documents"], columns["context"],
        states=states, digest=path.name,
    )  # fmt: skip
