"""Ask while the model goes on: the states are there before its last layer is done.

`att` is captured before the last feed-forward sublayer and the output layer, which for one token
take about as long as a search, or as a head's product. One core is left to that, which then costs
little: a model's step for one token is bound by memory, so it does not miss the core. A search that
takes all cores waits for them instead, where the model's products gain as much by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knnlm_hf.capture import Collector
from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import Few, has_hit
from knnlm_hf.memory import HybridMemory, KNNMemory
from knnlm_hf.memory.neighbours import NeighbourMemory
from knnlm_hf.memory.product import usual_is_slow
from knnlm_hf.memory.text import reads
from knnlm_hf.parallel import pool, spare_a_core, spare_none, threads_here

_MOST_TOKENS = 16
"""Beyond, model and search both fill all cores, and nothing is gained by having them share."""


def is_step(tokens: Any) -> bool:
    """Whether a forward on `tokens` is one of generation on the CPU: a few tokens, no gradients.

    Not under autocast, which is a thread's own and has dtypes of its own.
    """
    few = isinstance(tokens, Tensor) and tokens.shape[:2].numel() <= _MOST_TOKENS
    on_cpu = few and tokens.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and not torch.is_grad_enabled()


class Ahead:
    """The memories' answers to one forward, each asked for as soon as its states pass by.

    A context manager around the forward. It acts only where the answers are sure to be the same as
    when asked afterwards: memories that search and heads in evaluation, in a step of generation on
    the CPU. One that is shown the text first can only search by then, which is what takes the time.
    """

    def __init__(self, memories: Iterable[Any]) -> None:
        """Prepare to ask `memories`, any memories; there are none to ask where it `is_step` not."""
        self._threads = threads_here()
        self._early = {id(memory) for memory in memories if self._can_be_early(memory)}
        self._asked: dict[int, tuple[Tensor, Callable[[], Any]]] = {}

    def _can_be_early(self, memory: Any) -> bool:
        if isinstance(memory, nn.Module):
            # Its product is gained only on a second core, and only where model and product would
            # gain less from having both.
            return not memory.training and self._threads > 1 and usual_is_slow()
        if type(memory) in _SEARCH_APART:
            return usual_is_slow() or not memory.index.takes_all_cores
        return hasattr(memory, "finding" if reads(memory) else "search")

    def __enter__(self) -> Ahead:
        if self._early:
            spare_a_core(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        if self._early:
            spare_none(self._threads)

    def ask(self, memory: Any, heard: Collector, kept: Callable[[], Tensor | None]) -> None:
        """Begin to answer what was just heard; a later pass replaces an earlier one.

        Args:
            memory: one of those prepared for.
            heard: where its states have just passed.
            kept: gives the states of the positions that will have logits.
        """
        self._asked.pop(id(heard), None)
        if id(memory) in self._early and heard.raw is not None and heard.raw.device.type == "cpu":
            states = kept()
            if states is not None:
                # What cannot be searched with is of no account if another pass replaces it.
                with suppress(KNNLMError):
                    self._asked[id(heard)] = heard.raw, _begin(memory, states)

    def is_asked(self, heard: Collector) -> bool:
        """Whether the answer for these states is on its way."""
        return id(heard) in self._asked

    def answer(self, heard: Collector) -> Any:
        """The answer to what was heard last, or a memory that is searching; None if not asked."""
        raw, answer = self._asked.get(id(heard), (None, None))
        return answer() if answer is not None and raw is heard.raw else None


class Answer(NamedTuple):
    """What a memory says of some states."""

    log_probs: Tensor
    """(..., V)."""
    has_hit: Tensor | None
    """(..., 1), see `interpolation.has_hit`."""


def ask(memory: Any, states: Tensor, device: torch.device | None = None) -> Answer:
    """The memory's answer to states (..., D), on `device` (None: on theirs)."""
    log_probs = memory.log_probs(states).to(device or states.device)
    # To look at all V would take as long as to mix them.
    always = getattr(memory, "always_speaks", False)
    return Answer(log_probs, None if always else has_hit(log_probs))


def ask_of_one(memory: Any, state: Tensor) -> Answer | Few:
    """The same of a single state in a step of generation, in short where neighbours say it."""
    method = memory.log_probs
    is_own = getattr(method, "__self__", None) is memory  # not handed on from another
    if not is_own or getattr(method, "__func__", None) is not NeighbourMemory.log_probs:
        return ask(memory, state)
    said = memory.said_of_one(state)
    return said if isinstance(said, Few) else Answer(said, has_hit(said))


_SEARCH_APART = KNNMemory, HybridMemory
"""Not those derived from them, which may do any part in a way of their own."""


def _begin(memory: Any, states: Tensor) -> Callable[[], Any]:
    """Have another thread search, or answer; what is returned waits for that.

    All but the search for neighbours is done later where it can be: there every operation waits for
    the interpreter's lock, which the model has.
    """
    if type(memory) in _SEARCH_APART:
        twin = memory.searching(states, pool.submit)
        return lambda: twin
    return pool.submit(_answer, memory, states).result


def _answer(memory: Any, states: Tensor) -> Any:
    return memory.finding(states) if reads(memory) else ask(memory, states)
