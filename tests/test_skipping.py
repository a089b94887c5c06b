"""Greedy generation asks no memory where it could not change the token, and only there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from architectures import V, tiny, tokenizer
from stores import random
from test_generating import IDS
from test_generating import SETTINGS as FEW_STEPS
from tiny_memory import head_of
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    TextStreamer,
    TopKLogitsWarper,
)

from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory import CacheMemory, HybridMemory, KNNMemory, MLPMemory
from knnlm_hf.modeling import KNNLMForCausalLM, ahead, mixture, skipping
from knnlm_hf.modeling.generating import is_giving_only_tokens
from knnlm_hf.modeling.skipping import choosing_the_likeliest, is_settled
from knnlm_hf.parallel import pool

STEPS = 40
SETTINGS: dict[str, Any] = FEW_STEPS | {"max_new_tokens": STEPS, "min_new_tokens": STEPS}


def sure(model_type: str = "gpt2") -> Any:
    """A model that is sure of some tokens and not of others."""
    model = tiny(model_type)
    torch.manual_seed(1)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(V, 32) / 2)
    return model


def made(lmbda: Any = 0.3) -> Any:
    model = sure()
    return KNNLMForCausalLM(model, head_of(model), lmbda)


class Wrapper:
    """As much of one as is looked at."""

    _knnlm_base = GenerationMixin


@contextmanager
def answers() -> Iterator[list[Any]]:
    """Collects the memories that are asked for an answer."""
    seen, answer = [], mixture._answer

    def watched(own: Any, call: Any, asked: Any, *args: Any) -> Any:
        seen.append(asked.term.memory)
        return answer(own, call, asked, *args)

    with patch.object(mixture, "_answer", watched):
        yield seen


@contextmanager
def under_way() -> Iterator[list[Any]]:
    """Collects the answers that were begun while the model went on."""
    seen, answer = [], ahead.Ahead.answer

    def watched(self: Any, heard: Any) -> Any:
        found = answer(self, heard)
        seen.extend([] if found is None else [found])
        return found

    with patch.object(ahead.Ahead, "answer", watched):
        yield seen


def generated(knn: Any, **settings: Any) -> tuple[Tensor, int]:
    """The tokens, and how often a memory was asked."""
    with answers() as seen:
        tokens = knn.generate(IDS, **SETTINGS | settings)
    return tokens, len(seen)


@contextmanager
def greedy(knn: Any, *processors: Any) -> Iterator[None]:
    """As inside generate()."""
    settings = {
        "generation_config": GenerationConfig(do_sample=False),
        "logits_processor": LogitsProcessorList(processors),
    }
    with (
        patch.object(skipping, "is_giving_only_tokens", lambda _: True),
        choosing_the_likeliest(knn, settings),
    ):
        assert not is_settled(knn, log_probs(1.0, 0.0), 0.1)  # the first step always asks
        yield


def log_probs(*probs: float) -> Tensor:
    return torch.tensor([[probs]]).log()


@pytest.mark.parametrize(
    ("probs", "lmbda", "expected"),
    [
        ((0.7, 0.3), 0.25, True),  # 0.4 against 1/3
        ((0.3, 0.7), 0.25, True),
        ((0.66, 0.34), 0.25, False),  # 0.32
        ((0.1, 0.2, 0.6, 0.1), 0.25, True),
        ((0.1, 0.3, 0.6), 0.25, False),
        ((0.5, 0.5), 0.01, False),
        ((0.51, 0.49), 0.01, True),
        ((1.0, 0.0), 0.25, True),
        ((1.0, 0.0), 0.49, True),
        ((1.0, 0.0), 0.5, False),  # the other could be as likely
        ((1.0, 0.0), 0.9, False),
        ((1.0,), 0.25, True),
        ((math.nan, math.nan), 0.25, False),
        ((0.9, math.nan), 0.25, False),
    ],
)
def test_the_bound(probs: tuple[float, ...], lmbda: float, expected: bool) -> None:
    knn = Wrapper()
    lm = log_probs(*probs)
    before = lm.clone()
    assert not is_settled(knn, lm, lmbda)
    with greedy(knn):
        assert is_settled(knn, lm, lmbda) is expected
        assert not is_settled(Wrapper(), lm, lmbda)  # another wrapper
    assert not is_settled(knn, lm, lmbda)
    assert torch.equal(lm, before) or math.isnan(probs[-1])


def test_no_memory_can_change_what_is_settled() -> None:
    """The worst that one can say is that the second is certain; just above the bound it may."""
    generator = torch.Generator().manual_seed(0)
    knn, seen = Wrapper(), set()
    for _ in range(3000):
        sharpness, lmbda = (torch.rand(2, generator=generator) * torch.tensor([8.0, 0.5])).tolist()
        lm_V = torch.log_softmax(torch.randn(12, generator=generator) * sharpness, dim=-1)
        with greedy(knn):
            settled = is_settled(knn, lm_V, lmbda)
        first, second = lm_V.topk(2).indices.tolist()
        worst_V = (1 - lmbda) * lm_V.double().exp()
        worst_V[second] += lmbda
        seen.add((settled, int(worst_V.argmax()) == first))
    assert {(True, True), (False, False)} <= seen  # and, just within the rounding, (False, True)
    assert (True, False) not in seen


def test_several_positions_or_rows_are_not_settled() -> None:
    knn = Wrapper()
    with greedy(knn):
        lm_22 = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        assert is_settled(knn, lm_22[:1], 0.2)
        assert not is_settled(knn, lm_22[:, None], 0.2)
        assert not is_settled(knn, lm_22[None], 0.2)
        assert not is_settled(knn, lm_22[:1].to("meta"), 0.2)  # to look at a GPU's is to wait


def test_an_end_that_must_not_come_yet() -> None:
    """What is likeliest may be it; then another token is chosen, which a memory can change."""
    knn, lm = Wrapper(), log_probs(0.9, 0.06, 0.04)
    with greedy(knn, MinLengthLogitsProcessor(8, 0)):
        assert not is_settled(knn, lm, 0.2)
    with greedy(knn, MinLengthLogitsProcessor(8, [1, 2])):
        assert is_settled(knn, lm, 0.2)
    with greedy(knn, MinLengthLogitsProcessor(8, [1, 2]), TopKLogitsWarper(2)):
        assert not is_settled(knn, lm, 0.2)


@pytest.mark.parametrize("kind", ["head", "exact", "IVF2,SQ8", "hybrid", "cache", "two"])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_tokens_are_the_mixtures(
    kind: str, is_ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "usual_is_slow", lambda: is_ahead)
    model = sure()
    store = random(tmp_path / "store", dim=32)
    if kind == "IVF2,SQ8":
        store.build_index(kind, progress=False)
    memory: Any = {
        "head": lambda: head_of(model),
        "exact": lambda: KNNMemory(store, k=8, temperature=5.0, index="exact"),
        "IVF2,SQ8": lambda: KNNMemory(store, k=8, temperature=5.0, index=kind),
        "hybrid": lambda: HybridMemory(store, k=8, temperature=5.0),
        "cache": lambda: CacheMemory.of(model, size=64, k=16),
        "two": lambda: [head_of(model, "ffn"), CacheMemory.of(model, size=64, k=16)],
    }[kind]()
    memories = len(memory) if kind == "two" else 1
    knn = KNNLMForCausalLM(model, memory, 0.3, allow_mismatch=True)
    with under_way() as early:
        tokens, times = generated(knn)
    assert pool._tasks.empty()  # no search goes on that nobody waits for
    with answers() as seen:
        output = knn.generate(IDS, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(tokens, output.sequences)
    assert len(seen) == STEPS * memories
    assert not torch.equal(tokens, model.generate(IDS, **SETTINGS))
    assert kind != "exact" or early
    if early:
        assert times == STEPS * memories
        return
    # Not one step too many is skipped, and none too few: counted from the model alone.
    with torch.no_grad():
        lm_TV = model(tokens).logits[0, IDS.shape[1] - 1 : -1].softmax(dim=-1)
    first_T, second_T = lm_TV.topk(2).values.unbind(dim=-1)
    is_asked_T = first_T - second_T <= 0.3 / 0.7
    is_asked_T[0] = True
    assert int(is_asked_T.sum()) * memories == times
    assert 0 < times < STEPS * memories


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 0},  # without processors
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5]},
        {"guidance_scale": 1.5},
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 2)])},
        {"cache_implementation": "static"},
    ],
    ids=",".join,
)
def test_where_more_is_needed_than_the_likeliest(settings: dict[str, Any]) -> None:
    knn = made()
    _, times = generated(knn)
    assert 0 < times < STEPS
    _, times = generated(knn, **settings)
    assert times >= STEPS


@pytest.mark.parametrize("sampled", [False, True])
def test_choices_of_a_config(sampled: bool) -> None:
    knn = made()
    config = GenerationConfig(
        do_sample=sampled, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0
    )
    with answers() as seen:
        knn.generate(IDS, generation_config=config)
    assert (len(seen) == STEPS) is sampled
    knn.generation_config = config
    with answers() as seen:
        knn.generate(IDS)
    assert (len(seen) == STEPS) is sampled


def test_shares_of_half_and_more() -> None:
    knn = made(0.5)
    assert generated(knn)[1] == STEPS
    knn.lmbda = 0.05
    assert generated(knn)[1] < STEPS


def test_a_look_at_the_logits_from_outside() -> None:
    knn = made()
    handle = knn.register_forward_hook(lambda *_: None)
    assert generated(knn)[1] == STEPS
    handle.remove()
    assert generated(knn)[1] < STEPS


class Curious:
    """A tokenizer, or what is done with its text, that asks the wrapper for itself."""

    def __init__(self, knn: Any) -> None:
        self.knn, self.seen = knn, []

    def decode(self, ids: Any, **_: Any) -> str:
        self.look()
        return "word "

    def look(self, *_: Any, **options: Any) -> None:
        self.seen.append(self.knn(torch.tensor([[7]])).logits)


@pytest.mark.parametrize("where", ["tokenizer", "text"])
def test_forwards_in_between_are_whole(where: str) -> None:
    knn = made(0.05)
    curious = Curious(knn)
    streamer = TextStreamer(curious if where == "tokenizer" else tokenizer())
    if where == "text":
        streamer.on_finalized_text = curious.look
    expected = knn(torch.tensor([[7]])).logits
    generated(knn, streamer=streamer)
    assert curious.seen
    assert all(torch.equal(logits, expected) for logits in curious.seen)


def test_a_known_streamer_sees_nothing_but_tokens() -> None:
    """So that a chat skips too."""
    knn = made()
    assert generated(knn, streamer=TextStreamer(tokenizer()))[1] < STEPS


def test_generations_within_are_whole() -> None:
    """An early exit asks the wrapper's own generate() for its scores."""
    model = sure("llama")
    knn = KNNLMForCausalLM(model, head_of(model, "model.layers.0"), 0.3)
    seen: list[list[Tensor]] = [[], []]
    own = type(knn).generate
    for scores, settled in zip(seen, (is_settled, lambda *_: False), strict=True):

        def watched(self: Any, *args: Any, to: Any = scores, **kwargs: Any) -> Any:
            made = own(self, *args, **kwargs)
            to.extend(getattr(made, "scores", ()))
            return made

        with (
            patch.object(mixture, "is_settled", settled),
            patch.object(type(knn), "generate", watched),
        ):
            knn.generate(IDS, **SETTINGS, assistant_early_exit=1)
    assert seen[0]
    assert all(map(torch.equal, *seen))


def test_others_within_the_method() -> None:
    """Who replaces a method that sees the logits may look at them, and is called."""
    knn = made()
    for name in ("_sample", "_prefill", "_update_model_kwargs_for_generation"):
        for cls in (GenerationMixin, type(knn.unwrap())):
            method, calls = getattr(cls, name), []

            def mine(
                self: Any, *args: Any, _is: Any = method, to: Any = calls, **options: Any
            ) -> Any:
                to.append(_is)
                return _is(self, *args, **options)

            with patch.object(cls, name, mine):
                assert generated(knn)[1] == STEPS
            assert calls
    assert generated(knn)[1] < STEPS


@pytest.mark.parametrize("name", ["log_probs", "reading"])
def test_a_function_set_on_a_memory_is_called_at_every_step(name: str) -> None:
    model = sure()
    memory = CacheMemory.of(model, size=64, k=16)
    calls, method = [], getattr(memory, name)

    def spy(*args: Any) -> Any:
        calls.append(args)
        return method(*args)

    setattr(memory, name, spy)
    KNNLMForCausalLM(model, memory, 0.3).generate(IDS, **SETTINGS)
    assert len(calls) == STEPS


def test_a_memory_that_does_not_fit_is_found_out() -> None:
    model = sure()
    knn = KNNLMForCausalLM(model, head_of(model, "transformer.h.1.mlp.c_fc"), 0.05)
    with pytest.raises(KNNLMError, match="32-d states"):
        knn.generate(IDS, **SETTINGS)


def test_a_head_in_training_draws_at_every_step() -> None:
    model = sure()
    memory = MLPMemory(32, V, layers=1, dropout=0.5, layer="att")
    knn = KNNLMForCausalLM(model, memory, 0.3)
    assert generated(knn)[1] < STEPS
    memory.train()
    assert generated(knn)[1] == STEPS


def test_nothing_is_left_when_it_fails() -> None:
    knn = made()

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    assert not is_giving_only_tokens(knn)

    with patch.object(mixture, "is_settled", fails), pytest.raises(KeyboardInterrupt):
        generated(knn)
    assert skipping._choosing.get() is None
    assert not is_giving_only_tokens(knn)
    assert generated(knn)[1] < STEPS


def test_only_the_wrapper_that_generates() -> None:
    """One that is asked from within, as an assistant is, has a caller of its own."""
    knn, other = made(), made()
    seen = []

    def watched(*_: Any) -> bool:
        seen.append((is_giving_only_tokens(knn), is_giving_only_tokens(other)))
        return False

    with patch.object(mixture, "is_settled", watched):
        generated(knn)
    assert set(seen) == {(True, False)}


def test_end_of_text_comes_when_the_mixture_says_so() -> None:
    knn = made()
    tokens, _ = generated(knn)
    end = int(tokens[0, 12])
    first = int((tokens[0, 5:] == end).nonzero()[0]) + 5
    short = knn.generate(IDS, max_new_tokens=STEPS, do_sample=False, eos_token_id=end)
    assert short.shape[1] == first + 1
    later = {"min_new_tokens": 20, "eos_token_id": end, "max_new_tokens": STEPS}
    tokens, _ = generated(knn, **later)
    plain = knn.generate(IDS, **SETTINGS | later, return_dict_in_generate=True).sequences
    assert torch.equal(tokens, plain)
    assert tokens.shape[1] >= 5 + 20


def _searches(self: Any, *args: Any, **kwargs: Any) -> Any:
    return GenerationMixin._sample(self, *args, **kwargs)


@pytest.mark.parametrize("whose", ["model", "wrapper"])
def test_a_choice_of_its_own_is_left_to_it(whose: str) -> None:
    calls: list[Any] = []

    class Own:
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super()._sample(*args, **kwargs)  # type: ignore[misc]

    model, wrapper = sure(), KNNLMForCausalLM
    if whose == "model":
        members = {"__module__": type(model).__module__}
        model.__class__ = type("Model", (Own, type(model)), members)
    else:
        wrapper = type("Wrapper", (Own, KNNLMForCausalLM), {})
    assert generated(wrapper(model, head_of(model), 0.3))[1] == STEPS
    assert calls


def test_so_is_one_in_transformers() -> None:
    knn, theirs = made(), {**globals(), "__name__": "transformers.models.mine"}
    method = FunctionType(_searches.__code__, theirs)
    with patch.object(type(knn.unwrap()), "_sample", method):
        assert generated(knn)[1] == STEPS


def test_other_callers_of_the_method() -> None:
    """It is private, and may be called with less, or otherwise than generate() does."""
    knn = Wrapper()
    for settings in ({}, {"generation_config": None, "logits_processor": None, "knn": 1}):
        with (
            patch.object(skipping, "is_giving_only_tokens", lambda _: True),
            choosing_the_likeliest(knn, settings),
        ):
            assert not is_settled(knn, log_probs(0.9, 0.1), 0.2)
