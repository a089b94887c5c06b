"""The wrapper is its model in everything but the mixture, and leaves the model as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import reference
import torch
from architectures import D, V, tiny
from tiny_memory import TinyMemory, memory_of
from torch import Tensor, nn
from transformers import AutoModel, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from knnlm_hf import Datastore
from knnlm_hf.errors import CaptureError, KNNLMError, ModelMismatchError, SettingError
from knnlm_hf.modeling import KNNLMForCausalLM

IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 25, 61, 49, 53]])
CLOSE = {"rtol": 0, "atol": 2e-4}


def pair(model_type: str = "gpt2", layer: str = "att", lmbda: float = 0.6, **settings: Any) -> Any:
    model = tiny(model_type, **settings)
    return model, KNNLMForCausalLM(model, memory_of(model, model_type, layer), lmbda)


# --- what it is -----------------------------------------------------------------------------


def test_hand_worked_mixture() -> None:
    """P = 0.75 · P_LM + 0.25 · P_memory, where the memory is certain of token 7."""

    class Certain(TinyMemory):
        def log_probs(self, hidden: Tensor) -> Tensor:
            certain = torch.full((*hidden.shape[:-1], V), -torch.inf)
            certain[..., 7] = 0
            return certain

    model = tiny("gpt2")
    memory = Certain("att", torch.zeros(1, D), torch.zeros(1, dtype=torch.long), V, 1, 1.0)
    probs = KNNLMForCausalLM(model, memory)(IDS).logits.exp()  # λ is 0.25 unless given
    expected = 0.75 * model(IDS).logits.softmax(dim=-1)
    expected[..., 7] += 0.25
    torch.testing.assert_close(probs, expected)


def test_type_name_and_signature() -> None:
    model, knn = pair()
    assert isinstance(knn, KNNLMForCausalLM)
    assert isinstance(knn, GPT2LMHeadModel)
    assert type(knn).__name__ == "GPT2LMHeadModel"
    assert type(knn).__module__ == type(model).__module__
    assert inspect.signature(knn.forward) == inspect.signature(model.forward)
    assert type(knn).config_class is type(model).config_class
    assert type(pair()[1]) is type(knn)  # one class per model class
    assert type(model) is GPT2LMHeadModel
    assert "lmbda=0.6, memory=TinyMemory, layer='att'" in repr(knn)


def test_no_parameter_buffer_or_submodule_is_added() -> None:
    model, knn = pair()
    assert list(knn.state_dict()) == list(model.state_dict())
    assert [n for n, _ in knn.named_modules()] == [n for n, _ in model.named_modules()]
    for mine, its in zip(knn.parameters(), model.parameters(), strict=True):
        assert mine is its
    assert not hasattr(knn, "module")
    assert knn.base_model is model.transformer
    assert knn.config is model.config


def test_a_memory_that_is_a_module_is_not_registered() -> None:
    class Head(nn.Module):
        layer, hidden_size, vocab_size = "att", D, V

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(D, V)

        def log_probs(self, hidden: Tensor) -> Tensor:
            return self.out(hidden).log_softmax(dim=-1)

        def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
            return self.log_probs(hidden).gather(-1, tokens[..., None])[..., 0]

    model = tiny("gpt2")
    head = Head()
    knn = KNNLMForCausalLM(model, head)
    knn.memory = head
    assert knn.memory is head
    assert list(knn.state_dict()) == list(model.state_dict())
    knn(IDS, labels=IDS).loss.backward()
    assert head.out.weight.grad is not None  # a head can be trained through the mixture


def test_the_model_stays_as_it_was() -> None:
    model = tiny("gpt2")
    before = model(IDS, labels=IDS)
    knn = KNNLMForCausalLM(model, memory_of(model, "gpt2", "att"), 0.6)
    knn(IDS)
    knn.generation_config.max_new_tokens = 3
    knn.something = nn.Linear(2, 2)
    after = model(IDS, labels=IDS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert model.generation_config.max_new_tokens is None
    assert not hasattr(model, "something")
    assert not hasattr(model, "_knnlm")


def test_several_memories_on_one_model() -> None:
    model = tiny("gpt2")
    layers = ("att", "ffn", "final")
    knns = [KNNLMForCausalLM(model, memory_of(model, "gpt2", layer), 0.6) for layer in layers]
    for layer, knn in zip(layers, knns, strict=True):
        plain, hidden = reference.run(model, reference.place(model, "gpt2", layer), IDS)
        truth = reference.mixture(plain.logits, hidden, knn.memory, 0.6)
        np.testing.assert_allclose(knn(IDS).logits.detach().numpy(), truth, **CLOSE)


def test_wrapping_a_wrapper_wraps_its_model() -> None:
    model, knn = pair()
    other = memory_of(model, "gpt2", "ffn")
    again = KNNLMForCausalLM(knn, other, 0.3)
    assert type(again).__bases__ == (KNNLMForCausalLM, GPT2LMHeadModel)
    assert torch.equal(again(IDS).logits, KNNLMForCausalLM(model, other, 0.3)(IDS).logits)
    assert knn.memory is not other


def test_unwrap_gives_the_model() -> None:
    model, knn = pair()
    base = knn.unwrap()
    assert type(base) is GPT2LMHeadModel
    assert torch.equal(base(IDS).logits, model(IDS).logits)
    assert base.lm_head is model.lm_head
    assert base.loss_type == model.loss_type


def test_a_users_subclass() -> None:
    class Mine(KNNLMForCausalLM):
        def mine(self) -> float:
            return self.lmbda

    model, knn = pair()
    mine = Mine(model, knn.memory, 0.5)
    assert isinstance(mine, Mine)
    assert mine.mine() == 0.5
    assert isinstance(copy.deepcopy(mine), Mine)
    assert not isinstance(KNNLMForCausalLM(model, knn.memory), Mine)


# --- settings -------------------------------------------------------------------------------


def test_settings_can_be_changed() -> None:
    model, knn = pair(lmbda=0.1)
    knn.lmbda = 0.6
    other = memory_of(model, "gpt2", "ffn")
    knn.memory = other
    assert knn.memory is other
    assert torch.equal(knn(IDS).logits, KNNLMForCausalLM(model, other, 0.6)(IDS).logits)


@pytest.mark.parametrize("lmbda", [1, 1.5, -0.1, float("nan"), float("inf")])
def test_lambda_out_of_range(lmbda: float) -> None:
    model, knn = pair()
    with pytest.raises(SettingError, match="expected 0 <= lmbda < 1"):
        KNNLMForCausalLM(model, knn.memory, lmbda)
    with pytest.raises(SettingError, match="expected 0 <= lmbda < 1"):
        knn.lmbda = lmbda
    assert knn.lmbda == 0.6


def test_layer_can_be_named_otherwise() -> None:
    model, knn = pair()
    named = KNNLMForCausalLM(model, knn.memory, 0.6, layer="transformer.h.1.mlp:input")
    assert torch.equal(named(IDS).logits, knn(IDS).logits)
    assert named.capture_point.path == "transformer.h.1.mlp"


def test_another_layer_than_the_memory_s_is_refused() -> None:
    model, knn = pair()
    with pytest.raises(ModelMismatchError, match="layer 'att', asked to read 'ffn'"):
        KNNLMForCausalLM(model, knn.memory, 0.6, layer="ffn")
    knowingly = KNNLMForCausalLM(model, knn.memory, 0.6, layer="ffn", allow_mismatch=True)
    assert knowingly.capture_point.path == "transformer.h.1"


# --- refusals -------------------------------------------------------------------------------


def test_no_causal_language_model() -> None:
    memory = memory_of(tiny("gpt2"), "gpt2", "att")
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    for model, message in [
        (nn.Linear(2, 2), "cannot wrap Linear: expected a causal language model"),
        ("gpt2", "cannot wrap str"),
        (AutoModel.from_config(tiny("gpt2").config), "GPT2Model, a model without an LM head"),
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration, a model an encoder-decoder"),
        (torch.compile(tiny("gpt2")), "wrap first, then torch.compile"),
    ]:
        with pytest.raises(KNNLMError, match=message):
            KNNLMForCausalLM(model, memory)


def test_memory_that_is_none() -> None:
    with pytest.raises(KNNLMError, match="float is no memory"):
        KNNLMForCausalLM(tiny("gpt2"), 0.25)


@pytest.mark.parametrize("layer", ["att", "final", "transformer.h.0"])
def test_another_hidden_size(layer: str) -> None:
    """A module's width is known at the first forward, that of the others at once."""
    memory = TinyMemory(layer, torch.zeros(4, 20), torch.zeros(4, dtype=torch.long), V, 2, 1.0)
    with pytest.raises(KNNLMError, match=r"20-d states \(layer .*gives 32-d"):
        KNNLMForCausalLM(tiny("gpt2"), memory)(IDS)
    if layer == "att":
        with pytest.raises(KNNLMError, match="20-d"):
            KNNLMForCausalLM(tiny("gpt2"), memory)


def test_vocabulary_larger_than_the_models() -> None:
    memory = TinyMemory("att", torch.zeros(4, D), torch.zeros(4, dtype=torch.long), V + 1, 2, 1.0)
    with pytest.raises(KNNLMError, match="has 65 tokens, GPT2LMHeadModel only 64"):
        KNNLMForCausalLM(tiny("gpt2"), memory)


def test_unknown_layer() -> None:
    memory = TinyMemory("atn", torch.zeros(4, D), torch.zeros(4, dtype=torch.long), V, 2, 1.0)
    with pytest.raises(CaptureError, match="no layer 'atn'"):
        KNNLMForCausalLM(tiny("gpt2"), memory)


def test_memory_of_another_model() -> None:
    """Peers' bug 8: the memory is asked whether it fits, unless knowingly overridden."""

    class Particular(TinyMemory):
        def check_model(self, model: Any) -> None:
            assert type(model) is GPT2LMHeadModel
            raise ModelMismatchError("made with another model")

    model, knn = pair()
    own = knn.memory
    memory = Particular("att", own.keys, own.values, V, 4, 1.0)
    with pytest.raises(ModelMismatchError):
        KNNLMForCausalLM(model, memory)
    with pytest.raises(ModelMismatchError):
        knn.memory = memory
    assert knn.memory is own
    assert KNNLMForCausalLM(model, memory, allow_mismatch=True).memory is memory


def test_states_that_do_not_belong_to_logits() -> None:
    """A module that sees something else than one state per token."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, ::2]

    model = tiny("gpt2")
    model.transformer.h[0].odd = Half()
    model.transformer.h[0].register_forward_hook(lambda m, a, o: (m.odd(o), o)[1])
    memory = TinyMemory(
        "transformer.h.0.odd", torch.zeros(4, D), torch.zeros(4, dtype=torch.long), V, 2, 1.0
    )
    with pytest.raises(KNNLMError, match="expected one state per logit"):
        KNNLMForCausalLM(model, memory)(IDS)


# --- forward --------------------------------------------------------------------------------


def test_arguments_by_position() -> None:
    model, knn = pair()
    names = list(inspect.signature(model.forward).parameters)
    at = names.index("labels")
    given: list[Any] = [IDS] + [None] * (at - 1) + [IDS]
    assert torch.equal(knn(*given).loss, knn(IDS, labels=IDS).loss)
    with pytest.raises(TypeError, match="several values for input_ids"):
        knn(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match="arguments at most"):
        knn(*[None] * 40)


def test_position_ids_and_mask_reach_the_model() -> None:
    """Peers' bug 3: a left-padded row is the row alone, given its own positions."""
    _, knn = pair()
    padded = torch.nn.functional.pad(IDS[:1], (3, 0))
    mask = (torch.arange(8) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    row = knn(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(row, knn(IDS[:1]).logits, **CLOSE)
    assert not torch.allclose(knn(padded, attention_mask=mask).logits[:, 3:], row, atol=1e-2)


def test_inputs_embeds() -> None:
    model, knn = pair("opt")  # it flattens its states to (B·T, D)
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(knn(inputs_embeds=embeds).logits, knn(IDS).logits, **CLOSE)


def test_vocabulary_smaller_than_the_models() -> None:
    """Padded embeddings: the rows that the memory does not know get nothing from it."""
    model = tiny("gpt2")
    own = memory_of(model, "gpt2", "att")
    memory = TinyMemory("att", own.keys, own.values.clamp(max=59), 60, 8, own.t)
    plain, hidden = reference.run(model, reference.place(model, "gpt2", "att"), IDS)
    truth = reference.mixture(plain.logits, hidden, memory, 0.6)
    logits = KNNLMForCausalLM(model, memory, 0.6)(IDS).logits.detach().numpy()
    np.testing.assert_allclose(logits, truth, **CLOSE)
    alone = reference.log_softmax(plain.logits.double().numpy())
    np.testing.assert_allclose(logits[..., 60:], alone[..., 60:] + np.log(0.4), **CLOSE)


def test_a_query_without_any_hit_is_the_model_alone() -> None:
    """Peers' bug 2: no NaN, and no probability out of nothing."""

    class Sparse(TinyMemory):
        def log_probs(self, hidden: Tensor) -> Tensor:
            answer = super().log_probs(hidden)
            answer[:, 1::2] = -torch.inf
            return answer

    model = tiny("gpt2")
    own = memory_of(model, "gpt2", "att")
    memory = Sparse("att", own.keys, own.values, V, 8, own.t)
    logits = KNNLMForCausalLM(model, memory, 0.6)(IDS, labels=IDS).logits
    alone = model(IDS).logits.log_softmax(dim=-1)
    assert torch.equal(logits[:, 1::2], alone[:, 1::2])
    assert not torch.allclose(logits[:, ::2], alone[:, ::2], atol=0.1)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Peers' bug 5: half-precision models give a float32 mixture of their own logits."""
    model = tiny("llama").to(dtype)
    where = reference.place(model, "llama", "att")
    memory = memory_of(model, "llama", "att")
    knn = KNNLMForCausalLM(model, memory, 0.6)
    plain, hidden = reference.run(model, where, IDS)
    logits = knn(IDS).logits
    assert logits.dtype == torch.float32
    truth = reference.mixture(plain.logits, hidden, memory, 0.6)
    np.testing.assert_allclose(logits.detach().numpy(), truth, **CLOSE)
    with knn.disable_retrieval():
        assert knn(IDS).logits.dtype == dtype
    assert knn.generate(IDS, max_new_tokens=3).shape == (2, 8)


def test_half_after_wrapping() -> None:
    _, knn = pair("llama")
    knn.half()
    assert knn.dtype == torch.float16
    assert knn(IDS).logits.dtype == torch.float32


def test_loss_options() -> None:
    _, knn = pair()
    mean = knn(IDS, labels=IDS).loss
    by_items = knn(IDS, labels=IDS, num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(by_items, mean * 8 / 16)
    assert knn.loss_type == "ForCausalLM"  # or Trainer miscounts by (T − 1)/T


def test_router_loss_is_kept() -> None:
    """A mixture of experts adds its balancing loss, as the model does."""
    model, knn = pair("mixtral")
    options = {"labels": IDS, "output_router_logits": True}
    plain, base = knn(IDS, labels=IDS).loss, model(IDS, **options)
    torch.testing.assert_close(knn(IDS, **options).loss - plain, 0.001 * base.aux_loss)
    knn.lmbda = 0
    torch.testing.assert_close(knn(IDS, **options).loss, base.loss)


def test_tuple_by_config_and_other_outputs() -> None:
    model, knn = pair()
    assert isinstance(knn(IDS, return_dict=False), tuple)
    output = knn(IDS, labels=IDS, output_hidden_states=True, output_attentions=False)
    assert list(output)[:2] == ["loss", "logits"]
    assert len(output.hidden_states) == 3
    config = copy.deepcopy(model.config)
    config.return_dict = False
    knn.config = config
    assert isinstance(knn(IDS), tuple)
    assert not isinstance(knn(IDS, return_dict=True), tuple)


def test_trained_through_the_mixture() -> None:
    """Gradients of the mixture's loss reach the model, with checkpointing and without."""
    grads = []
    for checkpointing in (False, True):
        _, knn = pair("llama")
        knn.train()
        if checkpointing:
            older = knn.gradient_checkpointing_enable
            getattr(knn, "activation_checkpointing_enable", older)()
        knn(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append(knn.lm_head.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


def test_answer_on_another_device_is_moved() -> None:
    """Peers' bug 11: nothing is hard-coded to a device; here the memory answers from its own."""

    class Elsewhere(TinyMemory):
        def log_probs(self, hidden: Tensor) -> Any:
            return Moved(super().log_probs(hidden))

    class Moved:
        def __init__(self, answer: Tensor) -> None:
            self.answer, self.shape = answer, answer.shape

        def to(self, device: torch.device) -> Tensor:
            return self.answer.to(device)

    model, knn = pair()
    memory = Elsewhere("att", knn.memory.keys, knn.memory.values, V, 8, knn.memory.t)
    assert torch.equal(KNNLMForCausalLM(model, memory, 0.6)(IDS).logits, knn(IDS).logits)


@pytest.mark.parametrize(
    "keep",
    [torch.tensor(2), slice(1, 3), [1, 3], np.array([1, 3]), np.int64(2), IDS.new_zeros(0)],
    ids=str,
)
def test_positions_are_chosen_as_the_model_chooses_them(keep: Any) -> None:
    model, knn = pair()
    truth = knn(IDS).logits[:, keep]
    logits = knn(IDS, logits_to_keep=keep).logits
    assert logits.shape == model(IDS, logits_to_keep=keep).logits.shape
    torch.testing.assert_close(logits, truth)


def test_what_a_forward_of_ones_own_keeps_stays_as_it_was() -> None:
    model, knn = pair()
    kept = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(GPT2LMHeadModel.forward(self, *args, **kwargs))
        return kept[-1]

    plain = model(IDS).logits
    model.forward = MethodType(forward, model)
    wrapped = KNNLMForCausalLM(model, knn.memory, 0.6)
    assert torch.equal(wrapped(IDS).logits, knn(IDS).logits)
    torch.testing.assert_close(kept[-1].logits, plain)


def test_exchanged_modules_are_still_heard() -> None:
    """Resized embeddings put a new head into the model: `final` must not fall silent."""
    model = tiny("llama")
    knn = KNNLMForCausalLM(model, memory_of(model, "llama", "final"), 0.6)
    knn.resize_token_embeddings(V + 8)
    knn.set_output_embeddings(nn.Linear(D, V + 8))
    probs = knn(IDS).logits.exp()
    assert knn.memory.asked == [(2, 5, D)]
    assert probs.shape[-1] == V + 8
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5))


# --- retrieval off --------------------------------------------------------------------------


def test_disable_nests_and_survives_errors() -> None:
    model, knn = pair()
    plain, mixed = model(IDS).logits, knn(IDS).logits
    with knn.disable_retrieval():
        with knn.disable_retrieval():
            assert torch.equal(knn(IDS).logits, plain)
        assert torch.equal(knn(IDS).logits, plain)
        assert not knn.retrieves
    with pytest.raises(ZeroDivisionError), knn.disable_retrieval():
        raise ZeroDivisionError
    assert torch.equal(knn(IDS).logits, mixed)


def test_disable_is_of_one_wrapper_in_one_thread() -> None:
    model, knn = pair()
    other = KNNLMForCausalLM(model, knn.memory, 0.6)
    mixed = knn(IDS).logits
    seen: list[Tensor] = []
    with knn.disable_retrieval():
        assert torch.equal(other(IDS).logits, mixed)
        with other.disable_retrieval():
            assert torch.equal(knn(IDS).logits, model(IDS).logits)
        thread = threading.Thread(target=lambda: seen.append(knn(IDS).logits))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], mixed)


# --- copies ---------------------------------------------------------------------------------


def test_deepcopy_shares_the_memory_only() -> None:
    _, knn = pair()
    twin = copy.deepcopy(knn)
    assert twin.memory is knn.memory
    assert twin.lmbda == knn.lmbda
    assert twin.lm_head.weight is not knn.lm_head.weight
    assert torch.equal(twin(IDS).logits, knn(IDS).logits)
    twin.lmbda = 0.1
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert knn.lmbda == 0.6
    assert not torch.allclose(twin(IDS).logits, knn(IDS).logits)


def test_shallow_copy() -> None:
    _, knn = pair()
    twin = copy.copy(knn)
    assert twin.lm_head.weight is knn.lm_head.weight
    assert torch.equal(twin(IDS).logits, knn(IDS).logits)


def test_pickle() -> None:
    _, knn = pair()
    twin = pickle.loads(pickle.dumps(knn))
    assert isinstance(twin, KNNLMForCausalLM)
    assert isinstance(twin, GPT2LMHeadModel)
    assert torch.equal(twin(IDS).logits, knn(IDS).logits)


def test_a_memory_that_cannot_be_pickled_says_so() -> None:
    class Local(TinyMemory):
        def __reduce__(self) -> Any:
            raise KNNLMError("this memory lives in one process")

    model, knn = pair()
    local = Local("att", knn.memory.keys, knn.memory.values, V, 8, 1.0)
    with pytest.raises(KNNLMError, match="lives in one process"):
        pickle.dumps(KNNLMForCausalLM(model, local))


# --- other people's hands on the model ------------------------------------------------------


def _halved(model: Any, *args: Any, **kwargs: Any) -> Any:
    output = GPT2LMHeadModel.forward(model, *args, **kwargs)
    output.logits = output.logits * 0.5
    return output


@pytest.mark.parametrize("bind", [MethodType, partial])
def test_a_forward_on_the_object_is_the_models(bind: Any) -> None:
    """A forward put on the model object (kernels, accelerate) must not bypass the mixture."""
    model = tiny("gpt2")
    memory = memory_of(model, "gpt2", "att")
    model.forward = MethodType(_halved, model) if bind is MethodType else partial(_halved, model)
    knn = KNNLMForCausalLM(model, memory, 0.6)
    plain, hidden = reference.run(model, reference.place(model, "gpt2", "att"), IDS)
    truth = reference.mixture(plain.logits, hidden, memory, 0.6)
    np.testing.assert_allclose(knn(IDS).logits.detach().numpy(), truth, **CLOSE)
    with knn.disable_retrieval():
        assert torch.equal(knn(IDS).logits, plain.logits)
    assert torch.equal(knn.unwrap()(IDS).logits, plain.logits)
    again = KNNLMForCausalLM(knn, memory, 0.6)
    assert torch.equal(again(IDS).logits, knn(IDS).logits)


def _hook(model: nn.Module) -> list[str]:
    """Put an accelerate hook on the model's root, as dispatch and offload do."""
    hooks = pytest.importorskip("accelerate.hooks")
    ran: list[str] = []

    class Log(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append("pre")
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            ran.append("post")
            return output

    hooks.add_hook_to_module(model, Log())
    return ran


@pytest.mark.parametrize("own_forward", [False, True])
def test_accelerate_before_wrapping(own_forward: bool) -> None:
    """accelerate keeps `forward` on the object: it must call the mixture, not the model."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("gpt2")
    memory = memory_of(model, "gpt2", "att")
    if own_forward:
        model.forward = MethodType(_halved, model)
    expected = KNNLMForCausalLM(model, memory, 0.6)(IDS).logits
    plain = model(IDS).logits
    ran = _hook(model)
    knn = KNNLMForCausalLM(model, memory, 0.6)
    assert torch.equal(knn(IDS).logits, expected)
    assert ran == ["pre", "post"]
    with knn.disable_retrieval():
        assert torch.equal(knn(IDS).logits, plain)
    assert torch.equal(copy.deepcopy(knn)(IDS).logits, expected)
    assert torch.equal(knn.unwrap()(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)
    hooks.remove_hook_from_module(knn)
    ran.clear()
    assert torch.equal(knn(IDS).logits, expected)
    assert ran == []


def test_accelerate_after_wrapping() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, knn = pair()
    expected = knn(IDS).logits
    ran = _hook(knn)
    assert torch.equal(knn(IDS).logits, expected)
    assert ran == ["pre", "post"]
    assert torch.equal(copy.deepcopy(knn)(IDS).logits, expected)
    assert torch.equal(knn.unwrap()(IDS).logits, model(IDS).logits)
    hooks.remove_hook_from_module(knn)
    assert torch.equal(knn(IDS).logits, expected)


@pytest.mark.parametrize("before", [True, False])
def test_accelerate_cpu_offload(before: bool) -> None:
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    model = tiny("llama")
    memory = memory_of(model, "llama", "att")
    expected = KNNLMForCausalLM(model, memory, 0.6)(IDS).logits
    if before:
        big_modeling.cpu_offload(model, execution_device=torch.device("cpu"))
    knn = KNNLMForCausalLM(model, memory, 0.6)
    if not before:
        big_modeling.cpu_offload(knn, execution_device=torch.device("cpu"))
    assert torch.equal(knn(IDS).logits, expected)


def test_peft() -> None:
    """A PEFT model's own base, adapters included, is wrapped."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    base = adapted.get_base_model()
    memory = memory_of(base, "llama", "att")
    knn = KNNLMForCausalLM(adapted, memory, 0.6)
    plain, hidden = reference.run(adapted, (base.model.layers[1].mlp, True), IDS)
    truth = reference.mixture(plain.logits, hidden, memory, 0.6)
    np.testing.assert_allclose(knn(IDS).logits.detach().numpy(), truth, **CLOSE)
    prompts = peft.get_peft_model(
        tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(KNNLMError, match="virtual tokens"):
        KNNLMForCausalLM(prompts, memory)


@pytest.mark.parametrize("whole", [True, False])
def test_a_datastore_of_a_peft_model_is_that_of_the_model_inside(tmp_path, whole: bool) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    base = adapted.get_base_model()
    built_with, wrapped = (adapted, base) if whole else (base, adapted)
    store = Datastore.build(built_with, [IDS[0].tolist()], tmp_path / "s", progress=False)
    _, hidden = reference.run(adapted, (base.model.layers[1].mlp, True), IDS[:1])
    np.testing.assert_allclose(store.keys[torch.arange(4)], hidden[0, :4], atol=2e-3, rtol=2e-3)
    knn = KNNLMForCausalLM(wrapped, store)
    assert torch.equal(knn(IDS).logits, KNNLMForCausalLM(built_with, store)(IDS).logits)
    store.append(wrapped, [IDS[1].tolist()], progress=False)
    with pytest.raises(ModelMismatchError, match="lacking"):
        KNNLMForCausalLM(tiny("llama"), store)


def test_peft_around_the_wrapper() -> None:
    peft = pytest.importorskip("peft")
    _, knn = pair("llama")
    mixed = knn(IDS).logits
    adapted = peft.get_peft_model(knn, peft.LoraConfig(r=2, target_modules=["gate_proj"])).eval()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, mixed)  # LoRA starts at zero
    assert adapted.generate(input_ids=IDS, max_new_tokens=2).shape == (2, 7)


def test_attention_can_be_switched() -> None:
    """transformers reads the source of the class's module for it."""
    _, knn = pair("llama")
    sdpa = knn(IDS).logits
    knn.set_attn_implementation("eager")
    torch.testing.assert_close(knn(IDS).logits, sdpa, **CLOSE)
    assert knn.config._attn_implementation == "eager"
    assert type(knn)._can_set_attn_implementation()


def test_stale_bound_calls_are_not_taken_over() -> None:
    """What compiling left on the model is bound to the model."""
    model = tiny("gpt2")
    memory = memory_of(model, "gpt2", "att")
    expected = KNNLMForCausalLM(model, memory, 0.6)(IDS).logits
    model._compiled_call = model.__call__
    model.compile(backend="eager")
    knn = KNNLMForCausalLM(model, memory, 0.6)
    assert "_compiled_call" not in vars(knn)
    assert torch.equal(knn(IDS).logits, expected)


def test_state_dict_round_trip_and_to() -> None:
    model, knn = pair()
    knn.load_state_dict({name: torch.zeros_like(w) for name, w in model.state_dict().items()})
    assert model.lm_head.weight.abs().sum() == 0
    assert knn.to(torch.float64).dtype == torch.float64
    assert knn.eval() is knn


def test_import_of_the_class_alone() -> None:
    assert sys.modules["knnlm_hf.modeling"].KNNLMForCausalLM is KNNLMForCausalLM
