"""Training a language model: what it learns, when it stops, how it resumes."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.study.lm_recipe import LMRecipe, LMTrained
from knnlm_hf.study.lm_training import (
    mean_loss,
    next_token_loss,
    stream,
    train_lm,
)

CYCLE = torch.arange(5).repeat(60)


def model(seed: int = 0, **changes):
    options = {"n_embd": 16, "n_layer": 1, "initializer_range": 0.1, "n_positions": 8}
    return tiny.gpt2(seed, **(options | changes))


def weights(found):
    return {name: p.detach().clone() for name, p in found.named_parameters()}


def train(found, tokens=CYCLE, valid=None, *, checkpoint=None, loss=next_token_loss, **changes):
    recipe = LMRecipe(**({"epochs": 3, "lr": 1e-2, "batch_size": 8} | changes))
    return train_lm(
        found, tokens, valid, recipe, window=8, loss=loss, checkpoint=checkpoint, progress=False
    )


class TestStream:
    def test_by_hand(self):
        assert stream([[1, 2], [], [3]]).tolist() == [1, 2, 3]
        assert stream([[1]]).dtype == torch.int64


class TestMeanLoss:
    def test_a_uniform_model(self):
        found = model()
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        assert mean_loss(found, CYCLE, window=8) == pytest.approx(math.log(tiny.VOCAB))

    @pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 60])
    def test_each_token_but_the_first_counts_once(self, length):
        found, tokens = model(initializer_range=0.5), CYCLE[:length]
        losses = []
        for start in range(0, length - 1, 8):
            piece = tokens[start : start + 9][None]
            with torch.no_grad():
                logits = found(input_ids=piece[:, :-1]).logits[0]
            losses += cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
        assert len(losses) == length - 1
        expected = sum(losses) / len(losses)
        assert mean_loss(found, tokens, window=8, batch_size=3) == pytest.approx(expected, rel=1e-5)


class TestTraining:
    def test_a_cycle_is_learned(self):
        found = model()
        trained = train(found, valid=CYCLE[:50], epochs=12)
        assert mean_loss(found, CYCLE, window=8) < 0.1
        assert trained.valid_loss == pytest.approx(mean_loss(found, CYCLE[:50], window=8), rel=1e-4)
        assert not trained.stopped
        assert not found.training
        assert json.dumps(trained.to_dict())

    def test_every_window_of_an_epoch_is_new_text(self):
        starts = []

        def loss(found, batch):
            starts.append(batch.starts)
            expected = CYCLE[batch.starts[:, None] + torch.arange(9)]
            assert torch.equal(batch.tokens, expected)
            return next_token_loss(found, batch)

        trained = train(model(), epochs=2, loss=loss)
        first, second = torch.cat(starts).chunk(2)
        assert len(first) == (300 - 1) // 8 - 1
        for epoch in (first, second):
            assert epoch.sort().values.diff().tolist() == [8] * (len(epoch) - 1)
            assert epoch.min() >= 0
            assert epoch.max() + 9 <= 300
        assert first.tolist() != second.tolist()
        assert trained.tokens == 2 * len(first) * 8

    def test_the_same_seed_gives_the_same_weights(self):
        a, b, c = model(), model(), model()
        train(a), train(b), train(c, seed=1)
        assert all(torch.equal(weights(a)[n], p) for n, p in weights(b).items())
        assert not all(torch.equal(weights(a)[n], p) for n, p in weights(c).items())

    def test_it_stops_where_validation_does_and_keeps_the_best(self):
        found, backwards = model(), CYCLE.flip(0)
        trained = train(found, valid=backwards, epochs=40, patience=2)
        assert trained.stopped
        assert trained.steps < 40 * 5
        assert trained.valid_loss == pytest.approx(mean_loss(found, backwards, window=8), rel=1e-4)

    def test_without_patience_the_last_weights_are_kept(self):
        found, backwards = model(), CYCLE.flip(0)
        trained = train(found, valid=backwards, epochs=12, patience=None)
        assert trained.steps == 12 * 5
        assert mean_loss(found, CYCLE, window=8) < 0.1
        assert trained.valid_loss > math.log(tiny.VOCAB)

    def test_dropout_is_off_when_asked(self):
        a, b = model(resid_pdrop=0.5), model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        train(a, dropout=False), train(b)
        assert all(torch.equal(weights(a)[n], p) for n, p in weights(b).items())

    def test_half_precision_products(self):
        found = model()
        train(found, dtype="bfloat16", epochs=12)
        assert mean_loss(found, CYCLE, window=8) < 0.2
        assert found.dtype == torch.float32

    def test_a_text_shorter_than_a_window(self):
        trained = train(model(), CYCLE[:4], epochs=1)
        assert trained.tokens == 3
        assert trained.steps == 1


class TestResume:
    @pytest.mark.parametrize("after", [3, 5, 7, 14])
    def test_a_killed_training_ends_with_the_same_weights(self, tmp_path, after):
        whole, killed = model(resid_pdrop=0.3), model(resid_pdrop=0.3)
        expected = train(whole, valid=CYCLE[:40], evaluations=2)
        calls = 0

        def loss(found, batch):
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return next_token_loss(found, batch)

        with pytest.raises(KeyboardInterrupt):
            train(killed, valid=CYCLE[:40], evaluations=2, checkpoint=tmp_path / "c", loss=loss)
        resumed = model(seed=5, resid_pdrop=0.3)
        trained = train(resumed, valid=CYCLE[:40], evaluations=2, checkpoint=tmp_path / "c")
        assert trained == expected
        assert all(torch.equal(weights(whole)[n], p) for n, p in weights(resumed).items())
        # It stays until the model is saved: nothing is trained again.
        again = model(seed=6, resid_pdrop=0.3)
        options = {"valid": CYCLE[:40], "evaluations": 2, "checkpoint": tmp_path / "c"}
        assert train(again, **options, loss=None) == expected
        assert all(torch.equal(weights(whole)[n], p) for n, p in weights(again).items())

    def test_a_checkpoint_of_something_else(self, tmp_path):
        def loss(found, batch):
            if loss.calls == 6:
                raise KeyboardInterrupt
            loss.calls += 1
            return next_token_loss(found, batch)

        loss.calls = 0
        with pytest.raises(KeyboardInterrupt):
            train(model(), checkpoint=tmp_path / "c", loss=loss)
        with pytest.raises(KNNLMError, match=r"its recipe lr is 0.01, expected 0.0001"):
            train(model(), checkpoint=tmp_path / "c", lr=1e-4)
        with pytest.raises(KNNLMError, match="its tokens is"):
            train(model(), CYCLE.flip(0), checkpoint=tmp_path / "c")
        (tmp_path / "c" / "state.json").write_text("{")
        with pytest.raises(KNNLMError, match="damaged"):
            train(model(), checkpoint=tmp_path / "c")


class TestRefusals:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"epochs": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"clip": 0.0}, {"dtype": "int8"},
            {"patience": 0}, {"weight_decay": -1.0}, {"evaluations": 0},
        ],
    )  # fmt: skip
    def test_settings_out_of_range(self, wrong):
        with pytest.raises(SettingError):
            train(model(), **wrong)

    def test_no_text(self):
        with pytest.raises(KNNLMError, match="training text has 1 tokens"):
            train(model(), CYCLE[:1])
        with pytest.raises(KNNLMError, match="validation text has 0 tokens"):
            train(model(), valid=CYCLE[:0])

    def test_a_loss_that_is_not_finite(self):
        def loss(found, batch):
            return next_token_loss(found, batch) * math.inf

        with pytest.raises(KNNLMError, match="smaller lr"):
            train(model(), loss=loss)


def test_what_training_did_is_plain_data():
    done = LMTrained(LMRecipe(), 1, 2, 3.0, 4.0, False)
    assert done.to_dict()["recipe"]["epochs"] == 10
