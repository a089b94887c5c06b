"""What counts as the same model, and what does not."""

import copy
import json

import pytest
import tiny
import torch
from transformers import MambaConfig, MambaForCausalLM

from knnlm_hf import identity


@pytest.fixture(scope="module")
def recorded():
    # A round trip through JSON: that is how it is kept.
    return json.loads(json.dumps(identity.describe(tiny.gpt2(), tiny.tokenizer())))


def test_the_same_model_is_the_same_in_any_dtype(recorded):
    assert identity.differences(recorded, tiny.gpt2(), tiny.tokenizer()) == []
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert identity.differences(recorded, tiny.gpt2().to(dtype)) == []
        other = identity.describe(tiny.gpt2().to(dtype))
        assert identity.differences(other, tiny.gpt2().to(torch.bfloat16)) == []


def test_id_and_path_do_not_count(recorded):
    model = tiny.gpt2()
    model.config._name_or_path = "someone/else"
    assert identity.differences(recorded, model) == []
    assert identity.name(identity.describe(model)) == "someone/else"
    assert "GPT2LMHeadModel" in identity.name(recorded)


def test_training_any_weight_is_a_difference(recorded):
    for name, _ in tiny.gpt2().named_parameters():
        model = tiny.gpt2()
        with torch.no_grad():
            weight = model.get_parameter(name)
            weight.mul_(1.02).add_(1e-3)
        (found,) = identity.differences(recorded, model)
        assert name in found
        assert "1 of" in found


def test_tolerance_is_two_to_the_minus_seven(recorded):
    for factor, same in ((1 + 2.0**-8, True), (1 + 2.0**-6, False)):
        model = tiny.gpt2()
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(factor)
        assert (identity.differences(recorded, model) == []) is same


def test_nan_is_no_match(recorded):
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    assert identity.differences(recorded, model)


def test_other_models_are_named(recorded):
    assert "hidden_size was 24, is 26" in identity.differences(recorded, tiny.gpt2(n_embd=26))
    assert "num_hidden_layers was 2, is 3" in identity.differences(recorded, tiny.gpt2(n_layer=3))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2))
    found = identity.differences(recorded, mamba)
    assert "model_type was gpt2, is mamba" in found
    assert any("no weight" in clause for clause in found)


def test_weights_that_cannot_be_read_are_not_compared(recorded):
    model = tiny.gpt2()
    model.transformer.h[0].mlp.to("meta")
    assert identity.differences(recorded, model) == []


def test_tokenizers(recorded):
    padded = tiny.tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert identity.differences(recorded, tiny.gpt2(), padded) == []
    other = copy.deepcopy(recorded)
    other["tokenizer"] = "0" * 64
    assert identity.differences(other, tiny.gpt2(), tiny.tokenizer()) == [
        "the tokenizer is another one"
    ]
    assert identity.differences(other, tiny.gpt2()) == []


def test_a_tokenizer_is_its_vocabulary_and_its_splitting():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def hashed(vocab, split):
        backend = Tokenizer(models.WordLevel(vocab, "a"))
        backend.pre_tokenizer = split
        return identity.tokenizer_hash(PreTrainedTokenizerFast(tokenizer_object=backend))

    by_space, by_word = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()
    one = hashed({"a": 0, "The": 1}, by_space)
    assert one == hashed({"The": 1, "a": 0}, by_space)
    assert one != hashed({"a": 1, "The": 0}, by_space)
    assert one != hashed({"a": 0, "The": 1}, by_word)
