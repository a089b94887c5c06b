"""Greedy generation asks no memory where it could not change the token, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from architectures import V, tiny
from stores import random
from tiny_memory import head_of
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    TopKLogitsWarper,
)

from knnlm_hf.memory import CacheMemory, HybridMemory, KNNMemory
from knnlm_hf.modeling import KNNLMForCausalLM, ahead, mixture, skipping
from knnlm_hf.modeling.generating import gives_only_tokens
from knnlm_hf.modeling.skipping import choosing_the_likeliest, is_settled

IDS = torch.tensor([[3, 9, 27, 17, 51]])
STEPS = 40
SETTINGS: dict[str, Any] = {
    "attention_mask": torch.ones_like(IDS),
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "do_sample": False,
}


def sure() -> Any:
    """A model that is sure of some tokens and not of others."""
    model = tiny("gpt2")
    torch.manual_seed(1)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(V, 32) / 2)
    return model


def made(lmbda: Any = 0.3) -> Any:
    model = sure()
    return KNNLMForCausalLM(model, head_of(model), lmbda)


@contextmanager
def answers() -> Iterator[list[Any]]:
    """Collects the memories that are asked for an answer."""
    seen, answer = [], mixture._answer

    def watched(own: Any, call: Any, asked: Any, *args: Any) -> Any:
        seen.append(asked.term.memory)
        return answer(own, call, asked, *args)

    with patch.object(mixture, "_answer", watched):
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
        patch.object(skipping, "gives_only_tokens", lambda _: True),
        choosing_the_likeliest(knn, settings),
    ):
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
    knn = object()
    lm = log_probs(*probs)
    before = lm.clone()
    assert not is_settled(knn, lm, lmbda)
    with greedy(knn):
        assert is_settled(knn, lm, lmbda) is expected
        assert not is_settled(object(), lm, lmbda)  # another wrapper
    assert not is_settled(knn, lm, lmbda)
    assert torch.equal(lm, before) or math.isnan(probs[-1])


def test_no_memory_can_change_what_is_settled() -> None:
    """The worst that one can say is that the second is certain; just above the bound it may."""
    generator = torch.Generator().manual_seed(0)
    knn, seen = object(), set()
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
    knn = object()
    with greedy(knn):
        lm_22 = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        assert is_settled(knn, lm_22[:1], 0.2)
        assert not is_settled(knn, lm_22[:, None], 0.2)
        assert not is_settled(knn, lm_22[None], 0.2)


def test_an_end_that_must_not_come_yet() -> None:
    """What is likeliest may be it; then another token is chosen, which a memory can change."""
    knn, lm = object(), log_probs(0.9, 0.06, 0.04)
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
    tokens, times = generated(knn)
    with answers() as seen:
        output = knn.generate(IDS, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(tokens, output.sequences)
    assert len(seen) == STEPS * memories
    assert 0 < times < STEPS * memories
    assert times % memories == 0
    # Not one step too many is skipped, and none too few: counted from the model alone.
    with torch.no_grad():
        lm_TV = model(tokens).logits[0, IDS.shape[1] - 1 : -1].softmax(dim=-1)
    first_T, second_T = lm_TV.topk(2).values.unbind(dim=-1)
    assert int((first_T - second_T <= 0.3 / 0.7).sum()) * memories == times
    assert not torch.equal(tokens, model.generate(IDS, **SETTINGS))


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
    ids=str,
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


def test_forwards_in_between_are_whole() -> None:
    """A streamer of transformers' may call the wrapper; it is asked for logits there."""
    knn = made(0.05)
    lm, full = knn.unwrap()(IDS).logits.log_softmax(dim=-1), knn(IDS).logits
    assert (lm - full).abs().max() > 0.01
    generated(knn)
    assert torch.equal(knn(IDS).logits, full)


def test_nothing_is_left_when_it_fails() -> None:
    knn = made()

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    assert not gives_only_tokens(knn)

    with patch.object(mixture, "is_settled", fails), pytest.raises(KeyboardInterrupt):
        generated(knn)
    assert skipping._choosing.get() is None
    assert generated(knn)[1] < STEPS


def test_only_the_wrapper_that_generates() -> None:
    """One that is asked from within, as an assistant is, has a caller of its own."""
    knn, other = made(), made()
    seen = []

    def watched(*_: Any) -> bool:
        seen.append((gives_only_tokens(knn), gives_only_tokens(other)))
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


def test_a_models_own_choice_is_left_to_it() -> None:
    calls: list[Callable[..., Any]] = []
    base = type(sure())

    class Own(base):  # type: ignore[misc, valid-type]
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(base._sample)
            return super()._sample(*args, **kwargs)

    Own.__module__ = base.__module__
    model = sure()
    own = Own(model.config).eval()
    own.load_state_dict(model.state_dict())
    knn = KNNLMForCausalLM(own, head_of(own), 0.3, allow_mismatch=True)
    assert generated(knn)[1] == STEPS
    assert calls


def test_other_callers_of_the_method() -> None:
    """It is private, and may be called with less, or otherwise than generate() does."""
    knn = SimpleNamespace()
    for settings in ({}, {"generation_config": None, "logits_processor": None}):
        with (
            patch.object(skipping, "gives_only_tokens", lambda _: True),
            choosing_the_likeliest(knn, settings),
        ):
            assert not is_settled(knn, log_probs(0.9, 0.1), 0.2)
