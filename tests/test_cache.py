"""The text itself as a memory: against loops in float64, in forwards, with KV caches, in scores."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from architectures import V
from architectures import tiny as tiny_of
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from knnlm_hf import (
    CacheMemory,
    Datastore,
    KNNLMForCausalLM,
    KNNMemory,
    explanation_page,
    perplexity,
    score,
    tune,
)
from knnlm_hf.capture import CapturePoint
from knnlm_hf.errors import KNNLMError, PersistenceError, SettingError
from knnlm_hf.memory.text import Reader, Text
from knnlm_hf.modeling.reading import StatesLayer, read
from knnlm_hf.sources import sources

CLOSE = {"rtol": 0, "atol": 2e-4}


def texts(rows: int = 2, length: int = 20, seed: int = 3) -> Tensor:
    """Texts of few words, so that they repeat themselves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 12, (rows, length), generator=generator)


def probabilities(states: Any, values: Any, starts: Any, **settings: Any) -> np.ndarray:
    """(S, V) by a plain loop: at each place the entries of its own text before it; NaN for none.

    Args:
        states: (S, D); values: (S,), negative where there is none.
        starts: (S,) the first place of each place's own text.
    """
    k, t, size = settings.get("k", 1024), settings.get("t", 4.0), settings.get("size", 4096)
    states = np.asarray(states, dtype=np.float64)
    probs = np.full((len(states), V), np.nan)
    for i, query in enumerate(states):
        own = [j for j in range(max(starts[i], i - size), i) if values[j] >= 0]
        if not own:
            continue
        if settings.get("metric") == "ip":
            similarity = np.array([query @ states[j] for j in own])
        else:
            similarity = np.array([-((query - states[j]) ** 2).sum() for j in own])
        nearest = np.argsort(-similarity, kind="stable")[:k]
        weights = np.exp((similarity[nearest] - similarity.max()) / t)
        probs[i] = 0
        for weight, n in zip(weights / weights.sum(), nearest, strict=True):
            probs[i, values[own[n]]] += weight
    return probs


def mixture(logits: Tensor, states: Tensor, ids: Tensor, lmbda: float, **settings: Any) -> Any:
    """log P, (B, T, V), of plain logits and states."""
    mixed = np.exp(reference.log_softmax(logits.double().numpy()))
    for row, (text, states_TD) in enumerate(zip(ids.tolist(), states, strict=True)):
        probs = probabilities(states_TD, [*text[1:], -1], [0] * len(text), **settings)
        said = ~np.isnan(probs[:, 0])
        mixed[row, said] = (1 - lmbda) * mixed[row, said] + lmbda * probs[said]
    return np.log(mixed)


def plain(model: Any, model_type: str, ids: Tensor, layer: str = "att") -> tuple[Tensor, Tensor]:
    output, states = reference.run(model, reference.place(model, model_type, layer), ids)
    return output.logits, states.reshape(*ids.shape, -1)


# --- the distribution -------------------------------------------------------------------------


def test_hand_worked() -> None:
    """After 5 7 5: the state after the first 5 is as near as can be, and 7 followed it."""
    memory = CacheMemory(1, 8, temperature=1.0)
    states = torch.tensor([[0.0], [3.0], [0.0]])  # after 5, after 7, after 5 again
    text = Text(states[None], torch.tensor([[7, 5, -1]]), torch.zeros(1, 3, dtype=torch.int64))
    reading = memory.reading(text, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    found = reading.log_probs(states).exp()
    assert found[0].tolist() == [0] * 8  # nothing stands before the first
    assert found[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    near, far = 1 / (1 + np.exp(-9)), np.exp(-9) / (1 + np.exp(-9))
    assert found[2].tolist() == pytest.approx([0, 0, 0, 0, 0, far, 0, near])
    near = reading.search(states, k=2)
    assert near.ids.tolist() == [[-1, -1], [0, -1], [0, 1]]
    assert near.tokens.tolist() == [[-1, -1], [7, -1], [7, 5]]
    assert near.similarity.tolist()[1:] == [[-9, -torch.inf], [0, -9]]
    targets = torch.tensor([7, 7, 5])
    of_targets = reading.token_log_probs(states, targets)
    assert of_targets.exp().tolist() == pytest.approx([0, 1, far])


def test_without_a_text_it_has_nothing_to_say() -> None:
    memory = CacheMemory(4, 8)
    assert bool((memory.log_probs(torch.randn(2, 3, 4)) == -torch.inf).all())
    assert memory.search(torch.randn(2, 4), k=3).ids.tolist() == [[-1] * 3] * 2
    assert memory.temperature == 2.0


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("k", "size"), [(1024, 4096), (3, 4096), (5, 7), (1, 1)])
def test_against_a_loop_in_float64(metric: str, k: int, size: int) -> None:
    """More queries than are compared at a time; keys far from the origin, where digits are few."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 300, 7, generator=generator) + (100 if metric == "l2" else 0)
    values = torch.randint(-1, V, (2, 300), generator=generator)
    parts = torch.tensor([[0] * 300, [0] * 120 + [1] * 180])
    starts = [[0] * 300, [0] * 120 + [120] * 180]
    k = min(k, 1 << 20)
    memory = CacheMemory(7, V, k=k, size=size, temperature=4.0, metric=metric)
    rows = torch.arange(2).repeat_interleave(300)
    places = torch.arange(300).repeat(2)
    reading = memory.reading(Text(states, values, parts), rows, places)
    found = reading.log_probs(states).exp().numpy()
    for row in range(2):
        truth = probabilities(
            states[row], values[row].tolist(), starts[row], k=k, size=size, metric=metric
        )
        np.testing.assert_allclose(found[row], np.nan_to_num(truth), atol=1e-4)


def test_equally_near_entries_and_k_beyond_them() -> None:
    states = torch.zeros(1, 6, 3)
    text = Text(states, torch.tensor([[1, 2, 2, 3, 1, -1]]), torch.zeros(1, 6, dtype=torch.int64))
    memory = CacheMemory(3, 4, k=100, temperature=0.5)
    reading = memory.reading(text, torch.tensor([0]), torch.tensor([5]))
    assert reading.log_probs(states[:, 5]).exp()[0].tolist() == pytest.approx([0, 0.4, 0.4, 0.2])
    assert reading.search(states[0, 5:]).ids[0, 5:].tolist() == [-1] * 95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_compared_in_float32(dtype: torch.dtype) -> None:
    states = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(1)).to(dtype) * 60
    text = Text(states, torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.int64))
    memory = CacheMemory(5, 9, temperature=900.0)
    reading = memory.reading(text, torch.tensor([0]), torch.tensor([8]))
    with torch.autocast("cpu", torch.bfloat16):
        found = reading.search(states[0, 8:], k=8)
    truth = -(states[0, :8].double() - states[0, 8].double()).square().sum(1)
    assert found.similarity.dtype == torch.float32
    torch.testing.assert_close(
        found.similarity[0].double(), truth.sort(descending=True).values, rtol=1e-5, atol=1e-2
    )


# --- in a forward -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["att", "ffn"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gpt_neox", "jamba"])
def test_forward_is_the_mixture(model_type: str, layer: str) -> None:
    model, ids = tiny_of(model_type), texts()
    logits, states = plain(model, model_type, ids, layer)
    truth = mixture(logits, states, ids, 0.4, k=6, t=4.0, size=9)
    memory = CacheMemory.of(model, layer, k=6, temperature=4.0, size=9)
    knn = KNNLMForCausalLM(model, memory, 0.4)
    output = knn(ids, labels=ids)
    np.testing.assert_allclose(output.logits.detach().numpy(), truth, **CLOSE)
    assert output.loss.item() == pytest.approx(reference.nll(truth, ids), abs=1e-4)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    for keep, kept in (
        (3, truth[:, -3:]),
        (torch.tensor([2, 11]), truth[:, [2, 11]]),
        (torch.tensor([[1, 2], [8, 0]]), np.stack([truth[0, [1, 2]], truth[1, [8, 0]]])),
        (mask, truth[mask.numpy()]),
    ):
        found = knn(ids, logits_to_keep=keep).logits
        np.testing.assert_allclose(found.detach().numpy(), kept, **CLOSE)
    with knn.disable_retrieval():
        assert torch.equal(knn(ids).logits, logits)


def test_the_first_token_is_the_models_alone() -> None:
    model = tiny_of("gpt2")
    knn = KNNLMForCausalLM(model, CacheMemory.of(model), 0.9)
    first = texts()[:, :1]
    assert torch.equal(knn(first).logits, model(first).logits.log_softmax(dim=-1))


def test_rows_do_not_see_each_other() -> None:
    model, ids = tiny_of("llama"), texts(3)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    together = knn(ids).logits
    for row in range(3):
        torch.testing.assert_close(together[row], knn(ids[row : row + 1]).logits[0], **CLOSE)


@pytest.mark.parametrize("with_mask", [True, False])
def test_left_padding(with_mask: bool) -> None:
    """Padding is no entry, also where only positions tell of it, as with a static cache."""
    model, ids = tiny_of("llama"), texts(1, 12)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    padded = torch.cat([torch.full((1, 5), 7), ids], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    four = torch.ones(17, 17).tril().bool() & mask.bool()
    four |= torch.eye(17).bool()
    given = mask if with_mask else four[None, None]
    found = knn(padded, attention_mask=given, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, knn(ids).logits, **CLOSE)


def test_packed_texts_do_not_see_each_other() -> None:
    model, ids = tiny_of("llama"), texts(2, 9)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    packed, positions = ids.reshape(1, -1), torch.arange(9).repeat(2)[None]
    block = torch.block_diag(torch.ones(9, 9).tril(), torch.ones(9, 9).tril()).bool()
    found = knn(packed, position_ids=positions, attention_mask=block[None, None]).logits
    torch.testing.assert_close(found.reshape(2, 9, V), knn(ids).logits, **CLOSE)


# --- with a KV cache --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "jamba", "opt"])
def test_token_by_token_is_as_all_at_once(model_type: str) -> None:
    model, ids = tiny_of(model_type), texts()
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0, size=7), 0.6)
    past: Any = None
    found = []
    with torch.no_grad():
        # A recurrent state takes no second piece of several tokens, in the model itself.
        pieces = [9] if model_type == "jamba" else [5, 4]
        for part in ids.split([*pieces, *[1] * 11], dim=1):
            output = knn(part, past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), knn(ids).logits, **CLOSE)


def test_what_was_cropped_is_forgotten_and_what_was_not_read_is_a_gap() -> None:
    model, ids = tiny_of("llama"), texts(1)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    memory: Any = CacheMemory.of(model, temperature=4.0)
    past = DynamicCache()
    with torch.no_grad():
        knn(ids[:, :12], past_key_values=past)
        past.crop(past.get_seq_length() - 15 if _crops_by_count() else 9)
        knn(ids[:, 9:10], past_key_values=past)  # rejected, then the same again
        assert past.get_seq_length() == 10
        found = knn(ids[:, 10:], past_key_values=past).logits
        torch.testing.assert_close(found, knn(ids).logits[:, 10:], **CLOSE)

        gap = DynamicCache()
        model(ids[:, :8], past_key_values=gap)  # by the model alone
        found = KNNLMForCausalLM(model, memory, 0.6)(ids[:, 8:], past_key_values=gap).logits
    logits, states = plain(model, "llama", ids)
    probs = probabilities(states[0], [*ids[0, 1:].tolist(), -1], [8] * 20)
    mixed = np.exp(reference.log_softmax(logits.double().numpy()))[0]
    mixed[9:] = 0.4 * mixed[9:] + 0.6 * probs[9:]
    np.testing.assert_allclose(found[0].numpy(), np.log(mixed)[8:], **CLOSE)


def _crops_by_count() -> bool:
    """Whether this transformers crops a cache by −(tokens to remove), or to a length."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), 0)
    try:
        cache.crop(3)
    except ValueError:
        return True
    return False


def test_prompts_of_embeddings_have_no_tokens_to_find() -> None:
    """Their states are compared, but what followed each is known for the last one alone."""
    model, ids = tiny_of("llama"), texts(2, 6)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.9)
    given: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    tokens = knn.generate(inputs_embeds=knn.get_input_embeddings()(ids), **given)
    whole = torch.cat([ids, tokens], dim=1)
    logits, states = plain(model, "llama", whole)
    for row in range(2):
        values = [-1] * 5 + [*whole[row, 6:].tolist(), -1]
        probs = probabilities(states[row], values, [0] * 11)
        mixed = np.exp(reference.log_softmax(logits[row].double().numpy()))
        said = ~np.isnan(probs[:, 0])
        mixed[said] = 0.1 * mixed[said] + 0.9 * probs[said]
        assert mixed.argmax(1)[5:10].tolist() == tokens[row].tolist()


def test_packed_texts_after_a_gap_do_not_see_each_other() -> None:
    """Two texts in a row; a token of the second is read by the model alone, the next by both."""
    model, ids = tiny_of("llama"), texts(1, 14)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    positions = torch.tensor([[*range(6), *range(8)]])
    past = DynamicCache()
    with torch.no_grad():
        knn(ids[:, :12], position_ids=positions[:, :12], past_key_values=past)
        with knn.disable_retrieval():
            knn(ids[:, 12:13], position_ids=positions[:, 12:13], past_key_values=past)
        knn(ids[:, 13:], position_ids=positions[:, 13:], past_key_values=past)
    (layer,) = (one for one in past.layers if isinstance(one, StatesLayer))
    assert layer.text.parts[0].tolist() == [0] * 6 + [1] * 8
    values = layer.text.values[0].tolist()
    assert values[:5] == ids[0, 1:6].tolist()
    assert values[5:11] == [-1, *ids[0, 7:12].tolist()]
    assert values[11:13] == [-1, -2]  # after the last that was read, and the gap itself


@pytest.mark.parametrize("pieces", [[16], [8, 8], [5, 11], [11, 5]])
def test_padding_in_the_middle_does_not_end_a_text(pieces: list[int]) -> None:
    model, ids = tiny_of("llama"), texts(1, 11)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    padded = torch.cat([ids[:, :5], torch.full((1, 5), 7), ids[:, 5:]], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 5 + [1] * 6])
    positions = mask.cumsum(1) - 1
    past, found, seen = DynamicCache(), [], 0
    with torch.no_grad():
        for part in padded.split(pieces, dim=1):
            seen += part.shape[1]
            here = slice(seen - part.shape[1], seen)
            given = {"attention_mask": mask[:, :seen], "position_ids": positions[:, here]}
            found.append(knn(part, past_key_values=past, **given).logits)
    (layer,) = (one for one in past.layers if isinstance(one, StatesLayer))
    assert layer.text.parts[0].tolist() == [0] * 16
    tokens = [*ids[0, 1:5].tolist(), *[-2] * 6, *ids[0, 6:].tolist(), -1]
    assert layer.text.values[0].tolist() == tokens
    last = torch.cat(found, dim=1)[:, -1]
    assert not torch.allclose(last, model(ids).logits[:, -1].log_softmax(-1), atol=0.05)


def test_a_prompt_read_in_inference_mode_goes_on_outside() -> None:
    model, ids = tiny_of("llama"), texts(1, 9)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    with torch.inference_mode():
        past = knn(ids[:, :6], use_cache=True).past_key_values
    with torch.no_grad():
        found = knn(ids[:, 6:], past_key_values=past).logits
        torch.testing.assert_close(found, knn(ids).logits[:, 6:], **CLOSE)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("given", ["ids", "ids and mask", "all", "flat positions", "embeddings"])
def test_a_token_of_one_text_is_read_as_one_of_two(seed: int, given: str) -> None:
    """It has a way of its own in `read`; padding, gaps and new texts included."""
    point = CapturePoint("att", "somewhere", "input")
    generator = torch.Generator().manual_seed(seed)
    caches, position, mask = [DynamicCache(), DynamicCache()], 0, torch.ones(2, 0)
    for length in (3, *[1] * 12):
        ids, skip, pad = (
            torch.randint(high, (length,), generator=generator).expand(2, -1) for high in (40, 4, 3)
        )
        position = 0 if skip[0, 0] == 3 else position + int(skip[0, 0] == 2)
        mask = torch.cat([mask, (pad > 0).float()], dim=1)
        positions = torch.arange(position, position + length)
        states = torch.randn(1, length, 4, generator=generator).expand(2, -1, -1)
        read_by = []
        for rows, cache in zip((1, 2), caches, strict=True):
            arguments: dict[str, Any] = {"past_key_values": cache, "input_ids": ids[:rows]}
            if given == "embeddings":
                arguments["inputs_embeds"] = states[:rows]
                del arguments["input_ids"]
            if given in ("ids and mask", "all"):
                arguments["attention_mask"] = mask[:rows]
            if given == "all":
                arguments["position_ids"] = positions.expand(rows, -1)
            if given == "flat positions":
                arguments["position_ids"] = positions
            read_by.append(read(point, states[:rows], arguments, None, None))
        for one, of_two in zip(read_by[0][:3], read_by[1][:3], strict=True):
            assert torch.equal(one[0], of_two[0])
            assert one.dtype == of_two.dtype
        position += length


@pytest.mark.parametrize("last", [0.0, 0.5, -torch.inf])
def test_a_mask_of_numbers_pads_where_it_is_zero(last: float) -> None:
    point = CapturePoint("att", "somewhere", "input")
    for rows in (1, 2):
        cache = DynamicCache()
        for length in (2, 1):
            mask = torch.ones(rows, 2 if length == 2 else 3)
            mask[:, -1] = 1.0 if length == 2 else last
            arguments = {
                "past_key_values": cache, "attention_mask": mask,
                "input_ids": torch.full((rows, length), 7),
            }  # fmt: skip
            text = read(point, torch.zeros(rows, length, 4), arguments, None, None)
        assert text.values[0].tolist() == [7, 7 if last else -2, -1 if last else -2]


@torch.no_grad()
def test_one_token_whose_logits_are_kept_twice() -> None:
    model = tiny.gpt2()
    knn = KNNLMForCausalLM(model, CacheMemory.of(model), 0.4)
    ids, cache = texts(1, 8), DynamicCache()
    knn(ids[:, :7], past_key_values=cache)
    twice = knn(ids[:, 7:], past_key_values=cache, logits_to_keep=torch.tensor([0, 0])).logits
    once = knn(ids).logits[:, -1:]
    torch.testing.assert_close(twice, once.repeat(1, 2, 1))


def test_positions_of_one_row_are_those_of_all() -> None:
    model, ids = tiny_of("gpt2"), texts(1, 12)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    positions = torch.arange(6).repeat(2)
    flat, row = (knn(ids, position_ids=p).logits for p in (positions, positions[None]))
    torch.testing.assert_close(flat, row)


def test_tokens_that_the_memory_has_no_name_for_are_no_entries() -> None:
    model, ids = tiny_of("gpt2"), texts()
    knn = KNNLMForCausalLM(model, CacheMemory(32, 8, temperature=4.0), 0.6)
    assert bool((ids >= 8).any())
    assert bool(knn(ids).logits.isfinite().all())


def test_offloading_brings_the_first_layer_back_when_it_is_this_ones_turn() -> None:
    class First:
        back = 0

        def prefetch(self) -> None:
            self.back += 1

    first = First()
    StatesLayer(CapturePoint("att", "x", "input"), first).prefetch()
    assert first.back == 1


def test_several_caches_of_one_layer_read_once() -> None:
    model, ids = tiny_of("gpt2"), texts()
    one = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    memories = [CacheMemory.of(model, temperature=4.0) for _ in range(2)]
    two = KNNLMForCausalLM(model, memories, [0.4, 0.2])
    options: Any = {"max_new_tokens": 8, "do_sample": False, "attention_mask": ids > 0}
    assert torch.equal(one.generate(ids, **options), two.generate(ids, **options))
    past = two(ids, use_cache=True).past_key_values
    assert len(past.layers) == model.config.n_layer + 1


def test_generate_batch_is_refused() -> None:
    model = tiny_of("llama")
    knn = KNNLMForCausalLM(model, CacheMemory.of(model))
    with pytest.raises(KNNLMError, match="use generate"):
        knn.init_continuous_batching()


# --- scores -----------------------------------------------------------------------------------


def scored_by_hand(items: list[list[int]], window: int, stride: int, **settings: Any) -> Any:
    """(lm, cache) probability of every token: states from plain forwards, window by window."""
    model = tiny.gpt2()
    lm, cached = [], []
    for ids in items:
        states, done, start = [], 0, 0
        while done < len(ids) - 1:
            inputs = torch.tensor([ids[start : start + window][: len(ids) - 1 - start]])
            logits, states_1TD = plain(model, "gpt2", inputs)
            new = start + inputs.shape[1] - done
            states += states_1TD[0, -new:].double().tolist()
            log_probs = reference.log_softmax(logits[0].double().numpy())[-new:]
            targets = ids[done + 1 : done + 1 + new]
            lm += [log_probs[i, token] for i, token in enumerate(targets)]
            done, start = done + new, start + stride
        probs = probabilities(states, ids[1:], [0] * len(states), **settings) if states else []
        cached += [p[token] for p, token in zip(probs, ids[1:], strict=True)]
    return np.array(lm), np.nan_to_num(np.array(cached)), np.isnan(np.array(cached))


@pytest.mark.parametrize(
    ("window", "stride", "batch_size", "size"), [(16, 8, 3, 4096), (16, 16, 8, 11), (32, 5, 1, 40)]
)
def test_scores_read_whole_documents(window: int, stride: int, batch_size: int, size: int) -> None:
    """Beyond the window, and never into another document; batches change nothing."""
    items, model = tiny.corpus(5, seed=4), tiny.gpt2()
    memory = CacheMemory.of(model, temperature=40.0, k=20, size=size)
    knn = KNNLMForCausalLM(model, memory, 0.4)
    options: Any = {"window": window, "stride": stride, "batch_size": batch_size}
    scores = score(knn, items, progress=False, **options)
    lm, cached, silent = scored_by_hand(items, window, stride, k=20, t=40.0, size=size)
    np.testing.assert_allclose(scores.lm_log_probs.numpy(), lm, **CLOSE)
    np.testing.assert_allclose(scores.memory_log_probs().exp().numpy(), cached, atol=1e-4)
    mixed = np.where(silent, np.exp(lm), 0.6 * np.exp(lm) + 0.4 * cached)
    np.testing.assert_allclose(scores.log_probs().numpy(), np.log(mixed), **CLOSE)
    report = perplexity(knn, items, progress=False, **options)
    assert report.perplexity == pytest.approx(np.exp(-np.log(mixed).mean()), rel=1e-4)
    assert report.perplexity == pytest.approx(scores.perplexity(), rel=1e-6)


def test_a_text_within_the_window_scores_as_its_forward() -> None:
    model, ids = tiny.gpt2(), texts(1, 30)[0]
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=40.0), 0.4)
    scores = score(knn, [ids.tolist()], progress=False)
    with torch.no_grad():
        log_probs = knn(ids[None]).logits[0, :-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs(), log_probs, **CLOSE)


def test_tune_finds_what_repeats_itself(tmp_path: Path) -> None:
    """A text of phrases that come again: the cache helps, beside a datastore of other text too."""
    model, items = tiny.gpt2(), tiny.corpus(6, seed=8)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model))
    best = tune(knn, items, progress=False)
    assert best.helps
    assert best.perplexity < best.base_perplexity
    assert (knn.memory.temperature, knn.memory.k) == (best.temperature, best.k)
    store = Datastore.build(model, tiny.corpus(2, seed=1), tmp_path / "store", progress=False)
    both = KNNLMForCausalLM(model, [KNNMemory(store, k=20), CacheMemory.of(model)])
    found = tune(both, items, progress=False)
    assert found.perplexity <= best.perplexity * (1 + 1e-6)
    again = perplexity(both, items, progress=False)
    assert again.perplexity == pytest.approx(found.perplexity, rel=1e-4)


def test_exclude_self_is_the_datastores(tmp_path: Path) -> None:
    model, items = tiny.gpt2(), tiny.corpus(2, seed=1)
    store = Datastore.build(model, items, tmp_path / "store", progress=False)
    both = KNNLMForCausalLM(model, [KNNMemory(store, k=9), CacheMemory.of(model)])
    with_cache = score(both, items, exclude_self=True, progress=False)
    alone = KNNLMForCausalLM(model, KNNMemory(store, k=9))
    without = score(alone, items, exclude_self=True, progress=False)
    assert torch.equal(with_cache.memory_log_probs()[0], without.memory_log_probs())
    with pytest.raises(KNNLMError, match="datastore, found none"):
        score(
            KNNLMForCausalLM(model, CacheMemory.of(model)), items,
            exclude_self=True, progress=False,
        )  # fmt: skip


def test_a_reader_keeps_no_more_than_it_needs() -> None:
    reader = Reader(CacheMemory(2, 9, size=5))
    for step in range(4):
        reader.read(torch.randn(3, 2), torch.arange(3), torch.full((3,), step))
        assert reader._text is not None
        assert reader._text.keys.shape[1] == 3  # of the last document
    assert reader._text.first == 9
    for _ in range(3):
        reader.read(torch.randn(3, 2), torch.arange(3), torch.full((3,), 3))
        assert reader._text.keys.shape[1] == 5
    assert reader._text.first == 16
    assert reader._text.keys.untyped_storage().nbytes() == 5 * 2 * 4


# --- where it came from -----------------------------------------------------------------------


def test_explain_shows_the_text_itself(tmp_path: Path) -> None:
    model, items = tiny.gpt2(), tiny.corpus(4, seed=5)
    store = Datastore.build(
        model, tiny.corpus(), tmp_path / "store", tokenizer=tiny.tokenizer(), progress=False
    )
    memories = [KNNMemory(store, k=9), CacheMemory.of(model, temperature=40.0, k=9)]
    knn = KNNLMForCausalLM(model, memories, [0.2, 0.4])
    ids = [token for item in items for token in item][:90]
    found = knn.explain(ids, top=9)
    scores = score(knn, [ids], progress=False)
    said = torch.tensor([e.token_log_prob for e in found[:-1]])
    torch.testing.assert_close(said, scores.log_probs(), **CLOSE)
    for explanation in found:
        own = [near for near in explanation.neighbours if near.memory == 1]
        assert len(own) == min(9, explanation.position)
        assert sum(near.weight for near in own) == pytest.approx(1 if own else 0)
        for near in own:
            assert near.document is None
            assert near.entry < explanation.position
            assert near.token == ids[near.entry + 1]
            assert near.token_text in (near.context or "")
    text = tiny.tokenizer().decode(ids)
    page = explanation_page(knn, text, tiny.tokenizer(), top=2)
    assert "this text" in page
    assert "this text" in str(sources(found[40:60]).columns[3]._cells)


# --- saved, copied, refused -------------------------------------------------------------------


@pytest.mark.parametrize("with_store", [False, True])
def test_saved_and_loaded(tmp_path: Path, with_store: bool) -> None:
    model, ids = tiny.gpt2(), texts()
    memories: list[Any] = [CacheMemory.of(model, size=50, k=9, temperature=3.0, metric="ip")]
    if with_store:
        store = Datastore.build(model, tiny.corpus(2), tmp_path / "store", progress=False)
        memories.insert(0, KNNMemory(store, k=9))
    knn = KNNLMForCausalLM(model, memories, 0.4)
    knn.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, knn(ids).logits)
    assert loaded.memories[-1].settings() == memories[-1].settings()
    assert "last 50 tokens" in (tmp_path / "saved" / "README.md").read_text()


def test_copies_and_pickles() -> None:
    model, ids = tiny.gpt2(), texts()
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, size=50, temperature=3.0), 0.4)
    for twin in (copy.deepcopy(knn), pickle.loads(pickle.dumps(knn))):
        assert torch.equal(twin(ids).logits, knn(ids).logits)
        assert twin.memory.settings() == knn.memory.settings()
    assert eval(repr(knn.memory)).settings() == knn.memory.settings()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": 1 << 45, "size": 1 << 62}, "k is 35184372088832"),
        ({"temperature": 0}, "temperature is 0"),
        ({"metric": "cosine"}, "cosine"),
        ({"layer": None}, "layer is None"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        CacheMemory(4, 8, **settings)


def test_unfit_places_and_states() -> None:
    model = tiny.gpt2()
    with pytest.raises(KNNLMError, match="choose att or ffn"):
        KNNLMForCausalLM(model, CacheMemory.of(model, "final"))
    with pytest.raises(KNNLMError, match="5-d states"):
        KNNLMForCausalLM(model, CacheMemory(5, tiny.VOCAB))
    memory = CacheMemory(2, 9)
    with pytest.raises(KNNLMError, match="expected \\(Q, 2\\)"):
        memory.search(torch.zeros(1, 3))
    with pytest.raises(KNNLMError, match="leave out"):
        memory.search(torch.zeros(1, 2), exclude=torch.tensor([0]))
    states = torch.tensor([[[0.0, 1.0], [torch.nan, 0.0], [0.0, 0.0]]])
    text = Text(states, torch.tensor([[3, 4, -1]]), torch.zeros(1, 3, dtype=torch.int64))
    for queries, places in ((states[0, 1:2], [1]), (states[0, 2:], [2])):
        reading = memory.reading(text, torch.tensor([0]), torch.tensor(places))
        with pytest.raises(KNNLMError, match="not finite"):
            reading.search(queries)
    with pytest.raises(KNNLMError, match="2 queries, but 1 places"):
        memory.reading(text, torch.tensor([0]), torch.tensor([0])).search(torch.zeros(2, 2))


def test_gradients_are_the_mixtures() -> None:
    """Through the model's share; what the text says is a constant, as a datastore's answer is."""
    model, ids = tiny_of("gpt2").double(), texts(1, 9)
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.4)
    knn(ids, labels=ids).loss.backward()
    found = model.transformer.h[0].attn.c_attn.weight.grad.clone()
    model.zero_grad()
    _, states = plain(model, "gpt2", ids)
    probs = torch.from_numpy(probabilities(states[0], [*ids[0, 1:].tolist(), -1], [0] * 9))
    said = ~probs[:, :1].isnan()
    lm = model(ids).logits[0].softmax(dim=-1)
    mixed = torch.where(said, 0.6 * lm + 0.4 * probs.nan_to_num(), lm)
    (-mixed[:-1].gather(1, ids[0, 1:, None]).log().mean()).backward()
    truth = model.transformer.h[0].attn.c_attn.weight.grad
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-6)


def test_compiled_as_eager() -> None:
    model, ids = tiny_of("llama"), texts()
    knn = KNNLMForCausalLM(model, CacheMemory.of(model, temperature=4.0), 0.6)
    compiled = torch.compile(knn, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, knn(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"hidden_size": "8"}, {"k": 1e30}, {"layer": 3}, {"metric": None}, {"no": 1}],
)
def test_damaged_settings_are_refused_in_a_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny.gpt2()
    KNNLMForCausalLM(model, CacheMemory.of(model)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memories"][0]["settings"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PersistenceError):
        KNNLMForCausalLM.from_pretrained(tmp_path)
