"""One forward of the mixture: run the model, listen, ask the memories, mix.

Shape suffixes: B batch, T position, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from knnlm_hf.capture import CapturePoint, Collector, Listening, arm
from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import Few, mix
from knnlm_hf.memory.text import Text, reads
from knnlm_hf.modeling.ahead import Ahead, Answer, ask, ask_of_one, is_step
from knnlm_hf.modeling.output_layer import InStep
from knnlm_hf.modeling.positions import inputs_of, kept
from knnlm_hf.modeling.reading import length_before, read
from knnlm_hf.modeling.skipping import is_settled

if TYPE_CHECKING:
    from knnlm_hf.memory.base import Memory
    from knnlm_hf.modeling.fit import Term

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(eq=False)
class Retrieval:
    """All that a wrapper has and its model has not."""

    terms: tuple[Term, ...]
    """Its memories."""
    lmbdas: tuple[float, ...]
    """λ of each."""
    output_path: str
    """Dotted path of the output layer."""
    output_layer: nn.Module
    """The model's; the wrapper may have it as another class, see `output_layer`."""
    names: tuple[str, ...]
    """The arguments of the model's forward."""
    own_forward: Callable[..., Any] | None
    """A forward that somebody had put on the model object itself; it is used as the model's."""
    loss_type: str | None
    """The model's, put back by `unwrap`."""
    weights: dict[str, Any]
    """A sample of the model's weights when it was first wrapped."""


def as_it_is(function: F) -> F:
    """Keep torch.compile from compiling `function` itself; what it calls may be compiled."""
    same: F = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return same


@as_it_is
def mixed_forward(
    knn: Any, own: Retrieval, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Run `inner`, the model's own forward, and return its output with the mixture in it.

    Args:
        knn: the wrapper.
        own: its settings.
        inner: its model's forward, bound.
        args, kwargs: what the wrapper's forward was given.

    Returns:
        The model's output (or tuple): `logits` replaced by log P(w|c) in float32, `loss` by the
        mixture's.
    """
    call = _prepare(knn, own, args, kwargs)
    with call.ahead, InStep(call.output_layer), Listening(asked.heard for asked in call.asked):
        output = inner(**call.arguments)
    return _finish(knn, own, call, output)


class _Asked(NamedTuple):
    """A memory that is asked in one forward; one with λ = 0 is not."""

    term: Term
    lmbda: float
    """λ as it was at the start of the call."""
    heard: Collector


class _Call(NamedTuple):
    arguments: dict[str, Any]
    """Of the model's forward, all by name."""
    labels: Tensor | None
    as_tuple: bool
    in_step: bool
    """Whether it is one of generation on the CPU, see `is_step`."""
    asked: list[_Asked]
    ahead: Ahead
    output_layer: nn.Module | None
    """The one that may be quick, in a step of generation."""
    reading: list[_Asked]
    """Those of `asked` that are shown the text before."""
    before: int | None
    """Tokens that its KV cache held before, where a memory reads the text."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _prepare(knn: Any, own: Retrieval, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    if len(args) > len(own.names):
        raise TypeError(f"forward takes {len(own.names)} arguments at most, got {len(args)}")
    arguments = dict(zip(own.names, args, strict=False))
    if twice := arguments.keys() & kwargs.keys():
        raise TypeError(f"forward got several values for {', '.join(sorted(twice))}")
    arguments |= kwargs
    return_dict = arguments.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(knn.config, "return_dict", True)
    arguments["return_dict"] = True
    labels = arguments.pop("labels", None)
    in_step = is_step(inputs_of(arguments))
    asked, ahead = _listen(knn, own, arguments, in_step)
    output_layer = knn._modules.get(own.output_path) if in_step and asked else None
    reading = [one for one in asked if reads(one.term.memory)]
    before = length_before(arguments) if reading else None
    as_tuple = not return_dict
    return _Call(
        arguments, labels, as_tuple, in_step, asked, ahead, output_layer, reading, before
    )  # fmt: skip


def _listen(
    knn: Any, own: Retrieval, arguments: dict[str, Any], in_step: bool
) -> tuple[list[_Asked], Ahead]:
    """A collector for each memory to be asked, which is asked as soon as its states pass by."""
    weighed = [pair for pair in zip(own.terms, own.lmbdas, strict=True) if pair[1] > 0]
    ahead = Ahead(term.memory for term, _ in weighed if in_step)

    def collector(term: Term) -> Collector:
        arm(knn, term.point)
        return Collector(
            term.point,
            then=lambda heard: ahead.ask(
                term.memory, heard, lambda: _heard_states(own, term, arguments, heard)
            ),
        )

    return [_Asked(term, lmbda, collector(term)) for term, lmbda in weighed], ahead


# Never compiled, nor what it calls: dynamo crashes in faiss, and inductor miscompiles logaddexp of
# a log-softmax and a scatter_add (the second term vanishes).
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _finish(knn: Any, own: Retrieval, call: _Call, output: Any) -> Any:
    logits = output.logits
    asked = [one for one in call.asked if one.heard.raw is not None]
    if asked or not call.asked:  # an assistant that exits early never reaches the layer
        logits = log_softmax(logits.float(), dim=-1)
    if asked:
        asked.sort(key=lambda one: call.ahead.is_asked(one.heard))  # they have the more time
        lmbdas = [one.lmbda for one in asked]
        texts = _texts(call, output)  # also where none is asked: the KV cache keeps them
        is_under_way = call.ahead.is_asked(asked[-1].heard)
        if is_under_way or not is_settled(knn, logits, math.fsum(lmbdas)):
            answers = [_answer(own, call, one, logits, texts) for one in asked]
            logits = mix_answers(logits, answers, lmbdas)
    if call.labels is None and own.own_forward is None:
        output["logits"] = logits  # nobody else has this object
    else:
        changed: dict[str, Any] = {"logits": logits}
        if call.labels is not None:
            changed["loss"] = _loss(knn, logits, call.labels, output, call.arguments)
        output = dataclasses.replace(output, **changed)
    return output.to_tuple() if call.as_tuple else output


def _texts(call: _Call, output: Any) -> dict[CapturePoint, Text]:
    """What memories that read the text have before them, by the place where they listen."""
    texts = {}
    for point, heard in {one.heard.point: one.heard for one in call.reading}.items():
        states_BTD = _all_states(call.arguments, heard)
        if states_BTD is not None:
            texts[point] = read(point, states_BTD, call.arguments, output, call.before)
    return texts


def _answer(
    own: Retrieval, call: _Call, asked: _Asked, lm: Tensor, texts: dict[CapturePoint, Text]
) -> Answer | Few:
    """What the memory says at the positions of `lm`."""
    early = call.ahead.answer(asked.heard)
    if isinstance(early, Answer) and early.log_probs.shape[:-1] == lm.shape[:-1]:
        return _padded(early, lm)
    states = _kept_states(own, asked.term, call.arguments, asked.heard, lm)
    searching = early is not None and not isinstance(early, Answer)
    memory: Any = early if searching else asked.term.memory
    if reads(memory):
        text = texts[asked.heard.point]
        memory = memory.reading(text, *_kept_places(own, call.arguments, text))
    on_cpu = states.device.type == lm.device.type == "cpu"
    if call.in_step and on_cpu and lm.numel() == lm.shape[-1]:
        _check_width(memory, states)
        answer = ask_of_one(memory, states)
        if isinstance(answer, Few):
            _missing_tokens(answer.vocab_size, lm)
            return answer
        return _padded(answer, lm)
    return memory_answer(states, memory, lm)


def memory_answer(states: Tensor, memory: Memory, like_V: Tensor) -> Answer:
    """What the memory says of states (..., D), to be mixed with the model's `like_V` (..., V).

    Raises:
        KNNLMError: states of another width than the memory's, or a vocabulary smaller than its.
    """
    _check_width(memory, states)
    return _padded(ask(memory, states, like_V.device), like_V)


def mix_answers(lm_V: Tensor, answers: Sequence[Answer | Few], lmbdas: Sequence[float]) -> Tensor:
    """Log of the mixture (..., V) of the model's log-probabilities `lm_V` and fitting answers."""
    said = [a if isinstance(a, Few) else a.log_probs for a in answers]
    return mix(lm_V, said, lmbdas, [None if isinstance(a, Few) else a.has_hit for a in answers])


def _check_width(memory: Memory, states: Tensor) -> None:
    if states.shape[-1] != memory.hidden_size:
        raise KNNLMError(
            f"the memory has {memory.hidden_size}-d states (layer {memory.layer!r}), the model "
            f"gives {states.shape[-1]}-d: use the model it was made with, or make it anew"
        )


def _missing_tokens(said: int, lm_V: Tensor) -> int:
    """How many tokens `lm_V`, which may be padded, has beyond those that something was said of."""
    missing = lm_V.shape[-1] - said
    if missing < 0:
        raise KNNLMError(
            f"the memory has {said} tokens, the model only {lm_V.shape[-1]}: use the model it was "
            "made with, or make it anew"
        )
    return missing


def _padded(answer: Answer, lm_V: Tensor) -> Answer:
    """The answer for as many tokens as `lm_V` has."""
    log_probs, hit = answer
    missing = _missing_tokens(log_probs.shape[-1], lm_V)
    return Answer(pad(log_probs, (0, missing), value=-torch.inf) if missing else log_probs, hit)


def _kept_states(
    own: Retrieval, term: Term, arguments: dict[str, Any], heard: Collector, logits: Tensor
) -> Tensor:
    """The captured states of exactly those positions that have logits."""
    states = _heard_states(own, term, arguments, heard)
    shape = () if states is None else tuple(states.shape)
    if states is None or shape[:-1] != logits.shape[:-1]:
        raise KNNLMError(
            f"layer {heard.point.layer!r} gives states of shape {shape} for logits "
            f"of shape {tuple(logits.shape)}, expected one state per logit: choose another layer"
        )
    return states


def _heard_states(
    own: Retrieval, term: Term, arguments: dict[str, Any], heard: Collector
) -> Tensor | None:
    """What was heard, sliced as the logits will be."""
    if term.sliced:
        return heard.raw
    states = _all_states(arguments, heard)
    return None if states is None else kept(own.names, arguments, states)


def _all_states(arguments: dict[str, Any], heard: Collector) -> Tensor | None:
    """What was heard, (B, T, D)."""
    inputs = inputs_of(arguments)
    return heard.states(inputs.shape[0] if isinstance(inputs, Tensor) else 1)


def _kept_places(own: Retrieval, arguments: dict[str, Any], text: Text) -> tuple[Tensor, Tensor]:
    """Row and place in `text` of each position that has logits; the new ones stand last in it."""
    rows, read_S = text.values.shape
    length = inputs_of(arguments).shape[1]
    keep = arguments.get("logits_to_keep")
    if rows == length == 1 and (keep is None or isinstance(keep, int)):
        places = torch.tensor([0, read_S - 1], device=text.values.device)
        return places[:1], places[1:]
    grid_BT2 = torch.cartesian_prod(
        torch.arange(rows, device=text.values.device),
        torch.arange(read_S - length, read_S, device=text.values.device),
    ).view(rows, length, 2)
    row, place = kept(own.names, arguments, grid_BT2).unbind(-1)
    return row, place


def _loss(
    knn: Any, logits: Tensor, labels: Tensor, output: Any, arguments: dict[str, Any]
) -> Tensor:
    """The mixture's loss. Log-probabilities are their own log-softmax, so it is the exact NLL."""
    options = {k: v for k, v in arguments.items() if k in _LOSS_OPTIONS}
    loss: Tensor = knn.loss_function(
        logits=logits, labels=labels, vocab_size=logits.shape[-1], **options
    )
    auxiliary = getattr(output, "aux_loss", None)  # balances the experts, where it was asked for
    if isinstance(auxiliary, Tensor):
        coefficients = (getattr(knn, name, None) for name in _AUXILIARY)
        coefficient = next((c for c in coefficients if c is not None), 0.0)
        loss = loss + coefficient * auxiliary.to(loss.device)
    return loss


_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
_AUXILIARY = ("router_aux_loss_coef", "aux_loss_coef")
