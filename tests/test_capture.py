"""Where states are read, that nothing after them is computed, and that listening stays private."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import suppress

import pytest
import reference
import torch
from architectures import V, tiny
from torch import nn
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from knnlm_hf.capture import CapturePoint, capturing, find, states
from knnlm_hf.errors import CaptureError

IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 25, 61, 49, 53]])


@torch.no_grad()
def test_by_hand() -> None:
    """att: the residual after the last attention, through the norm; ffn: that plus the MLP."""
    model = tiny("gpt2")
    gpt, last = model.transformer, model.transformer.h[1]
    x = gpt.wte(IDS) + gpt.wpe(torch.arange(5))
    x = gpt.h[0](x)
    after_attention = x + last.attn(last.ln_1(x))[0]
    att = last.ln_2(after_attention)
    ffn = after_attention + last.mlp(att)
    for layer, truth in {"att": att, "ffn": ffn, "final": gpt.ln_f(ffn)}.items():
        found = states(model, find(model, layer), IDS)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.lm_head(gpt.ln_f(ffn)), model(IDS).logits)


@torch.no_grad()
def test_att_of_llama_by_hand() -> None:
    model = tiny("llama")
    entering: list[torch.Tensor] = []
    last = model.model.layers[1]
    last.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    attended: list[torch.Tensor] = []
    last.self_attn.register_forward_hook(lambda _, args, output: attended.append(output[0]))
    found = states(model, find(model, "att"), IDS)
    truth = last.post_attention_layernorm(entering[0] + attended[0])
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)


def test_points() -> None:
    model = tiny("llama")
    assert find(model, "att") == CapturePoint("att", "model.layers.1.mlp", "input")
    assert find(model, "ffn") == CapturePoint("ffn", "model.layers.1", "output")
    assert find(model, "final") == CapturePoint("final", "lm_head", "input")
    assert find(model, "model.norm") == CapturePoint("model.norm", "model.norm", "output")
    assert find(model, "model.norm:input").side == "input"


def test_module_path_input() -> None:
    model = tiny("llama")
    by_path = states(model, find(model, "model.layers.1.mlp:input"), IDS)
    assert torch.equal(by_path, states(model, find(model, "att"), IDS))
    assert not torch.equal(by_path, states(model, find(model, "model.layers.1.mlp"), IDS))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("atn", "LlamaForCausalLM has no layer 'atn': choose one of att, ffn, final"),
        ("model.layer.1", r"no layer 'model.layer.1' \(near it: .*model.layers.1"),
        ("model.layers.7", "no layer 'model.layers.7'"),
        ("model.norm:output:x", "no layer"),
        ("", "no layer ''"),
        (3, "layer is 3, expected one of att, ffn, final"),
    ],
)
def test_unknown_layer(layer: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        find(tiny("llama"), layer)


def test_mamba_names_what_it_has() -> None:
    model = tiny("mamba")
    with pytest.raises(CaptureError, match=r"no feed-forward sublayer .*\(it has norm, mixer\)"):
        find(model, "att")
    with pytest.raises(CaptureError, match="choose one of ffn, final, or"):
        find(model, "nothing")


@pytest.mark.parametrize("model_type", ["xlnet", "cpmant"])
def test_states_that_are_not_one_per_token(model_type: str) -> None:
    model = tiny(model_type, d_inner=48) if model_type == "xlnet" else tiny(model_type, dim_ff=48)
    for layer in ("att", "ffn"):
        with pytest.raises(CaptureError, match="choose 'final'"):
            find(model, layer)
    assert states(model, find(model, "final"), IDS).shape == (2, 5, 32)


def test_no_language_model_head() -> None:
    with pytest.raises(CaptureError, match="no output embedding"):
        find(tiny("llama").model.layers[0], "final")
    with pytest.raises(CaptureError, match="no config"):
        find(nn.Linear(2, 2), "ffn")


def test_decoder_of_an_encoder_decoder() -> None:
    """Not wrapped yet, but its decoder's layers are found, whatever the encoder's depth."""
    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    assert find(T5ForConditionalGeneration(config), "ffn").path == "decoder.block.2"


def test_module_without_float_states() -> None:
    model = tiny("llama")
    with pytest.raises(CaptureError, match=r"input of module 'model.embed_tokens'.*no tensor"):
        states(model, find(model, "model.embed_tokens:input"), IDS)


def test_module_that_is_not_reached() -> None:
    model = tiny("mixtral")
    model.unused = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match="never reached layer 'unused'"):
        states(model, find(model, "unused"), IDS)


@pytest.mark.parametrize("layer", ["att", "ffn"])
def test_nothing_later_is_computed(layer: str) -> None:
    model = tiny("gpt2")
    point = find(model, layer)
    later = [model.transformer.ln_f, model.lm_head]
    if layer == "att":
        later.append(model.transformer.h[1].mlp.c_fc)
    for module in later:
        module.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    assert states(model, point, IDS).shape == (2, 5, 32)


def test_states_have_no_graph_and_no_cache() -> None:
    model = tiny("gpt2")
    seen = {}
    model.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    assert not states(model, find(model, "ffn"), IDS).requires_grad
    assert seen["use_cache"] is False


def test_padding_is_masked() -> None:
    model = tiny("llama")
    point = find(model, "att")
    padded = torch.nn.functional.pad(IDS, (0, 3))
    mask = (torch.arange(8) < 5).expand(2, 8).long()
    found = states(model, point, padded, attention_mask=mask)[:, :5]
    torch.testing.assert_close(found, states(model, point, IDS), rtol=0, atol=1e-5)


def test_hooks_sleep_outside_the_block() -> None:
    model = tiny("gpt2")
    point = find(model, "att")
    with capturing(point) as heard:
        model(IDS)
    first = heard.raw
    assert first is not None
    model(IDS + 1)
    assert heard.raw is first
    with capturing(point) as fresh:
        pass
    assert fresh.raw is None
    assert fresh.states(2) is None


def test_one_hook_however_often_it_is_found() -> None:
    model = tiny("gpt2")
    for _ in range(3):
        find(model, "att")
        find(model, "transformer.h.1.mlp:input")
    assert len(model.transformer.h[1].mlp._forward_pre_hooks) == 1


def test_blocks_nest_and_close_on_errors() -> None:
    model = tiny("gpt2")
    att, ffn = find(model, "att"), find(model, "ffn")
    with capturing(att) as outer:
        with suppress(RuntimeError), capturing(ffn) as inner:
            model(IDS)
            raise RuntimeError
        model(IDS + 1)
    assert outer.raw is not None
    assert inner.raw is not None
    assert torch.equal(outer.raw, states(model, att, IDS + 1))
    assert torch.equal(inner.raw, states(model, ffn, IDS))
    inner.raw = None
    model(IDS)
    assert inner.raw is None
    with capturing(att) as outer, capturing(att) as inner:
        model(IDS)
    assert outer.raw is inner.raw
    assert outer.raw is not None


def test_gradient_checkpointing_fires_nothing_afterwards() -> None:
    model = tiny("gpt2").train()
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)()
    point = find(model, "att")
    with capturing(point) as heard:
        loss = model(IDS, labels=IDS, use_cache=False).loss
    captured = heard.raw
    loss.backward()
    assert heard.raw is captured


def test_threads_do_not_hear_each_other() -> None:
    model = tiny("gpt2")
    point = find(model, "att")
    wrong: list[int] = []
    texts = [torch.full((1, 4), number + 3) for number in range(4)]
    mlp = model.transformer.h[1].mlp
    truths = [reference.states(model, (mlp, True), ids) for ids in texts]

    def work(number: int) -> None:
        for _ in range(30):
            with torch.no_grad(), capturing(point) as heard:
                model(texts[number])
            if heard.raw is None or not torch.equal(heard.raw, truths[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_hooked_model_is_copied_and_pickled() -> None:
    model = tiny("gpt2")
    point = find(model, "att")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, GPT2LMHeadModel)
        assert torch.equal(states(twin, point, IDS), states(model, point, IDS))
    assert list(model.state_dict()) == list(tiny("gpt2").state_dict())
