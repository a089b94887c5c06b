"""generate() in inference mode: where it is taken, and that nothing of it is left behind."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload
from architectures import V, tiny, tokenizer
from marked import nothing_stays_marked
from stores import random
from tiny_memory import head_of, memory_of
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from knnlm_hf import Datastore
from knnlm_hf.capture import capturing
from knnlm_hf.index import faiss as faiss_index
from knnlm_hf.index.exact import ExactIndex
from knnlm_hf.memory import CacheMemory, HybridMemory, KNNMemory
from knnlm_hf.modeling import KNNLMForCausalLM, ahead
from knnlm_hf.modeling.generating import _only_tokens

IDS = torch.tensor([[3, 9, 27, 17, 51]])
SETTINGS: dict[str, Any] = {
    "attention_mask": torch.ones_like(IDS),
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
}


def modes(knn: Any, **arguments: Any) -> set[bool]:
    """In which of the two modes its steps are."""
    seen, step = set(), GenerationMixin._update_model_kwargs_for_generation

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.is_inference_mode_enabled())
        return step(*args, **kwargs)

    with patch.object(GenerationMixin, step.__name__, watched):
        knn.generate(IDS, **SETTINGS, **arguments)
    return seen


class Decoder:
    """As much of a tokenizer as streaming takes, of somebody's own."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, list(ids))) + "\n"


class Keeper(BaseStreamer, StoppingCriteria):
    """Somebody's own, who keeps what comes by."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.kept.append(value)

    def end(self) -> None:
        pass

    def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Any:
        self.kept.append(ids)
        return torch.zeros(len(ids), dtype=torch.bool)


def made(model_type: str = "llama", **settings: Any) -> Any:
    model = tiny(model_type, **settings)
    return KNNLMForCausalLM(model, head_of(model), 0.6)


@pytest.fixture
def knn() -> Any:
    return made()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("choice", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}], ids=str)
def test_tokens_are_the_same(knn: Any, batch: int, choice: dict[str, Any]) -> None:
    settings = SETTINGS | {"attention_mask": torch.ones(batch, 5)} | choice
    torch.manual_seed(4)
    tokens = knn.generate(IDS.repeat(batch, 1), **settings)
    torch.manual_seed(4)
    plain = knn.generate(IDS.repeat(batch, 1), **settings, return_dict_in_generate=True).sequences
    assert torch.equal(tokens, plain)


def test_tokens_can_be_trained_on(knn: Any) -> None:
    assert modes(knn) == {True}
    tokens = knn.generate(IDS, **SETTINGS)
    assert not tokens.is_inference()
    tokens[0, 0] = 5  # elsewhere, one made in that mode refuses
    loss = knn(tokens, labels=tokens).loss
    loss.backward()
    assert knn.get_input_embeddings().weight.grad[5].abs().sum() > 0
    assert torch.embedding(nn.Parameter(torch.randn(V, 4)), tokens).requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generation_config": GenerationConfig(top_k=3, eos_token_id=None, pad_token_id=0)},
        {"stopping_criteria": [], "past_key_values": None, "tokenizer": object()},
        {"use_cache": False, "repetition_penalty": 1.2},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 2},  # 5.4 needs one
        {"streamer": TextStreamer(tokenizer()), "stopping_criteria": [MaxLengthCriteria(90)]},
    ],
    ids=["none", "config", "empty", "no cache", "prompt lookup", "visitors"],
)
def test_everyday_calls_are_in_inference_mode(knn: Any, arguments: dict[str, Any]) -> None:
    assert modes(knn, **arguments) == {True}


def test_other_memories(knn: Any) -> None:
    base = knn.unwrap()
    reads = CacheMemory.of(base)
    assert modes(KNNLMForCausalLM(base, [reads, head_of(base)], [0.2, 0.3])) == {True}
    own = memory_of(base, "llama", "att")
    assert modes(KNNLMForCausalLM(base, own)) == {False}  # of an unknown class
    assert modes(KNNLMForCausalLM(base, [head_of(base), own], [0.2, 0.2])) == {False}


@pytest.mark.parametrize("kind", ["exact", "IVF2,SQ8", "IVF2,SQ8,Refine(keys)", "hybrid", "cache"])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_memories_that_search(
    kind: str, is_ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether in this thread or, beside the model, in another, which is in no such mode."""
    monkeypatch.setattr(ahead, "usual_is_slow", lambda: is_ahead)
    monkeypatch.setattr(faiss_index, "has_torchs_threads", lambda: True)
    model = tiny("llama")
    store = random(tmp_path / "store", dim=32)
    if kind.startswith("IVF"):
        store.build_index(kind, progress=False)
    store = Datastore.open(store.path)
    if kind == "cache":
        memory: Any = CacheMemory.of(model)
    elif kind == "hybrid":
        memory = HybridMemory(store, k=8, temperature=5.0)
    else:
        memory = KNNMemory(store, k=8, temperature=5.0, index=kind)
    knn = KNNLMForCausalLM(model, memory, 0.6, allow_mismatch=True)
    with nothing_stays_marked():  # nor what is made when it is first needed
        assert modes(knn) == {True}
    plain = knn.generate(IDS, **SETTINGS, return_dict_in_generate=True).sequences
    assert torch.equal(knn.generate(IDS, **SETTINGS), plain)
    assert not torch.equal(model.generate(IDS, **SETTINGS), plain)


def test_indexes(tmp_path: Path) -> None:
    class Mine(ExactIndex):
        """Somebody's own."""

    model = tiny("llama")
    store = random(tmp_path / "store", dim=32)
    for index, mode in ((ExactIndex(store.keys), True), (Mine(store.keys), False)):
        memory = KNNMemory(store, index=index, k=8)
        assert modes(KNNLMForCausalLM(model, memory, allow_mismatch=True)) == {mode}


def test_other_forwards() -> None:
    class Mine(KNNLMForCausalLM):
        """Somebody's own."""

    class Other(KNNLMForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return "before", super().generate(*args, **kwargs)

    model = tiny("llama")
    assert modes(Mine(model, head_of(model))) == {False}
    assert Other(model, head_of(model)).generate(IDS, **SETTINGS)[0] == "before"
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert modes(KNNLMForCausalLM(model, head_of(model))) == {False}


@pytest.mark.parametrize(
    "arguments",
    [
        lambda knn: {"return_dict_in_generate": True},
        lambda knn: {"generation_config": GenerationConfig(return_dict_in_generate=True)},
        lambda knn: {"cache_implementation": "static"},
        lambda knn: {"past_key_values": DynamicCache(config=knn.config)},
        lambda knn: {"logits_processor": LogitsProcessorList([lambda ids, scores: scores])},
        lambda knn: {"prefix_allowed_tokens_fn": lambda row, ids: [1, 2, 3]},
        lambda knn: {"assistant_model": tiny("llama", seed=1)},
        lambda knn: {"streamer": Keeper()},
        lambda knn: {"streamer": TextStreamer(Decoder())},
        lambda knn: {"stopping_criteria": [MaxLengthCriteria(90), Keeper()]},
    ],
    ids=[
        "dict",
        "dict by config",
        "static",
        "cache",
        "processor",
        "prefix",
        "assistant",
        "streamer",
        "tokenizer",
        "criterion",
    ],
)
def test_what_outlives_the_call_is_not_made_in_inference_mode(
    knn: Any, arguments: Callable[[Any], dict[str, Any]]
) -> None:
    with nothing_stays_marked():
        assert modes(knn, **arguments(knn)) == {False}


def test_weights_that_are_nowhere() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny("llama").config).eval()
        knn = KNNLMForCausalLM(model, head_of(tiny("llama")), allow_mismatch=True)
    assert not _only_tokens(knn, SETTINGS)


def test_stop_strings(knn: Any) -> None:
    """transformers keeps a tensor of them, for good."""
    assert _only_tokens(knn, SETTINGS)
    assert not _only_tokens(knn, SETTINGS | {"stop_strings": ["the"], "tokenizer": object()})


@pytest.mark.parametrize(
    "setting", [{"return_dict_in_generate": True}, {"cache_implementation": "static"}], ids=str
)
def test_settings_of_the_model_hold_where_a_config_has_none(
    knn: Any, setting: dict[str, Any]
) -> None:
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0)
    assert modes(knn, generation_config=config) == {True}
    knn.generation_config.update(**setting)
    assert modes(knn, generation_config=config) == {False}
    knn.generate(IDS, generation_config=config)


def test_a_cache_of_the_users_can_be_trained_on(knn: Any) -> None:
    cache = DynamicCache(config=knn.config)
    tokens = knn.generate(IDS, **SETTINGS, past_key_values=cache)
    knn(tokens[:, -1:], past_key_values=cache, labels=tokens[:, -1:])
    made = knn.generate(IDS, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    assert not made.logits[0].is_inference()
    assert not made.past_key_values.layers[0].keys.is_inference()


class OtherLinear(nn.Linear):
    """Somebody's own module."""


def _hooked(knn: Any) -> None:
    knn.model.layers[0].register_forward_hook(lambda *_: None)


def _patched(knn: Any) -> None:
    layer = knn.model.layers[0].mlp
    layer.forward = layer.forward


def _other_module(knn: Any) -> None:
    knn.model.layers[0].mlp.up_proj.__class__ = OtherLinear


def _other_weight(knn: Any) -> None:
    class Quantised(nn.Parameter):
        pass

    layer = knn.model.layers[0].mlp.up_proj
    layer.weight = Quantised(layer.weight.data)


def _hooked_head(knn: Any) -> None:
    knn.memory.register_forward_pre_hook(lambda *_: None)


def _attention(knn: Any) -> None:
    AttentionInterface.register(
        "mine", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs)
    )
    knn.set_attn_implementation("mine")


def _other_method(knn: Any) -> None:
    prepare = knn.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def mine(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **kwargs)

    knn.prepare_inputs_for_generation = mine


def _other_function(knn: Any) -> None:
    del knn.model.layers[0].mlp.act_fn
    mine = torch.compiler.disable(lambda x: torch.nn.functional.silu(x))  # wrapped by torch's
    knn.model.layers[0].mlp.act_fn = mine


def _compiled_layer(knn: Any) -> None:
    knn.model.layers[0]._compiled_call_impl = knn.model.layers[0]._call_impl


@pytest.mark.parametrize(
    "change",
    [
        _hooked, _patched, _other_module, _other_weight, _hooked_head, _compiled_layer, _attention,
        _other_method, _other_function,
        lambda knn: knn.train(),
    ],
)  # fmt: skip
def test_unknown_code_does_not_run_in_inference_mode(
    knn: Any, change: Callable[[Any], None]
) -> None:
    expected = knn.generate(IDS, **SETTINGS)
    assert modes(knn) == {True}
    change(knn)
    assert modes(knn) == {False}
    knn.eval()
    assert torch.equal(knn.generate(IDS, **SETTINGS), expected)


def test_surroundings(knn: Any) -> None:
    """Nor under autocast, with a hook on all modules, in a model of remote code, or without kNN."""
    with torch.autocast("cpu", torch.bfloat16):
        assert modes(knn) == {False}
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert modes(knn) == {False}
    everywhere.remove()
    with knn.disable_retrieval():
        assert modes(knn) == {False}
    with capturing(knn.capture_point) as heard:
        assert modes(knn) == {False}
    assert heard.raw is not None
    assert not heard.raw.is_inference()
    with DeviceContext("cpu"):  # sees every call
        assert modes(knn) == {False}
    for cls in (LlamaForCausalLM, type(knn.model.layers[0].mlp)):
        forward = cls.forward

        @functools.wraps(forward)
        def mine(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        with patch.object(cls, "forward", mine):
            assert modes(knn) == {False}
    knn(IDS, output_hidden_states=True)  # leaves hooks that sleep
    assert modes(knn) == {True}
    remote = type("Remote", (type(knn.unwrap()),), {"__module__": "transformers_modules.me.model"})
    model = remote(copy.deepcopy(knn.config)).eval()
    assert modes(KNNLMForCausalLM(model, knn.memory)) == {False}


def test_a_generate_of_the_models_own() -> None:
    """It is given what was given, and shows what it takes."""

    class Own(LlamaForCausalLM):
        def generate(self, prompt: Any = None, **options: Any) -> Any:
            """Own."""
            return super().generate(prompt, **options)

    base = tiny("llama")
    model = Own(base.config).eval()
    model.load_state_dict(base.state_dict())
    knn = KNNLMForCausalLM(model, head_of(model), 0.6)
    tokens = KNNLMForCausalLM(base, head_of(base), 0.6).generate(IDS, **SETTINGS)
    assert torch.equal(knn.generate(IDS, **SETTINGS), tokens)
    assert torch.equal(knn.generate(prompt=IDS, **SETTINGS), tokens)
    assert inspect.signature(knn.generate) == inspect.signature(model.generate)
    assert knn.generate.__doc__ == "Own."


def test_offloaded_weights(knn: Any) -> None:
    """Their device is `meta` while they are away."""
    expected = knn.generate(IDS, **SETTINGS)
    model = cpu_offload(knn.unwrap(), execution_device=torch.device("cpu"))
    offloaded = KNNLMForCausalLM(model, knn.memory, 0.6, allow_mismatch=True)
    assert modes(offloaded) == {False}
    assert torch.equal(offloaded.generate(IDS, **SETTINGS), expected)


def test_positional_settings_and_streams(knn: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    tokens = knn.generate(IDS, config)
    assert torch.equal(tokens, knn.generate(inputs=IDS, generation_config=config))
    assert torch.equal(tokens, knn.generate(input_ids=IDS, generation_config=config))
    config.return_dict_in_generate = True
    made = knn.generate(IDS, config)
    assert torch.equal(tokens, made.sequences)
    assert not made.sequences.is_inference()
    config.return_dict_in_generate = False
    knn.generate(IDS, generation_config=config, streamer=TextStreamer(tokenizer()))
    assert str(int(tokens[0, -1])) in capsys.readouterr().out


def test_inside_inference_mode(knn: Any) -> None:
    """A user's own block stays a block of theirs."""
    with torch.inference_mode():
        tokens = knn.generate(IDS, **SETTINGS)
    assert torch.equal(tokens, knn.generate(IDS, **SETTINGS))


LONGER: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "xglm": {"max_position_embeddings": 16},
    "ctrl": {},
    "gpt2": {},
}


@pytest.mark.parametrize("model_type", LONGER)
def test_what_a_model_keeps_can_be_trained_with(model_type: str) -> None:
    """Rotary frequencies and tables of positions that grow with the text are kept in the model."""
    knn = made(model_type, **LONGER[model_type])
    before = knn.generate(IDS, **SETTINGS)
    with nothing_stays_marked():
        knn.generate(IDS, **SETTINGS | {"max_new_tokens": 24, "min_new_tokens": 24})
    knn(before, labels=before).loss.backward()
    assert torch.equal(knn.generate(IDS, **SETTINGS), before)


def test_nothing_is_left_when_it_fails() -> None:
    knn = made("llama", **LONGER["llama"])

    seen: list[bool] = []

    def decode(self: Any, ids: Any, **_: Any) -> str:
        seen.append(torch.is_inference_mode_enabled())
        if len(seen) > 20:
            raise KeyboardInterrupt
        return "word " * len(ids)

    streamer = TextStreamer(tokenizer())
    with patch.object(type(streamer.tokenizer), "decode", decode), pytest.raises(KeyboardInterrupt):
        knn.generate(IDS, **SETTINGS | {"max_new_tokens": 40}, streamer=streamer)
    assert set(seen) == {True}
    assert not torch.is_inference_mode_enabled()
    assert not any(t.is_inference() for m in knn.modules() for t in m.buffers())
    knn(IDS, labels=IDS).loss.backward()
