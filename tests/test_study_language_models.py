"""The study's language models, on toys known by hand: memories, soft labels, seeds, bigrams."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
import toy_study
from toy_study import BEST

from knnlm_hf.interpolation import mix
from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores
from knnlm_hf.study import Settings, Study, language_models, retrieval
from knnlm_hf.study import study as study_module
from knnlm_hf.study.bigram import Bigrams
from knnlm_hf.study.experiments import memorisation as memorising
from knnlm_hf.study.experiments.ensembling import before, ensembling, joined
from knnlm_hf.study.experiments.memorisation import memorisation
from knnlm_hf.study.experiments.soft_labels import SoftLabels, entry_numbers, soft_labels
from knnlm_hf.study.forward import rows_of
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.lm_training import LMBatch, next_token_loss
from knnlm_hf.windows import Window


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_study.study(tmp_path_factory.mktemp("toy"), lm_tokens=12_000)


def noise(tokens: int, seed: int) -> list[list[int]]:
    """Tokens drawn evenly from all: nothing can be learned but by heart."""
    return [np.random.default_rng(seed).integers(tiny.VOCAB, size=tokens).tolist()]


class TestMemorisation:
    @pytest.fixture(autouse=True)
    def short_texts(self, monkeypatch):
        """What is learned by heart within seconds is short."""
        monkeypatch.setattr(study_module, "FEWEST_ENTRIES", 1)

    def study(self, folder, **changes):
        model = tiny.gpt2(n_embd=64, n_layer=1, initializer_range=0.02, n_positions=16)
        return Study(
            model, None, train=noise(150, 1), valid=noise(3000, 2), test=noise(3000, 3),
            folder=folder, settings=Settings(k=8, resamples=200, **changes), show=False,
        )  # fmt: skip

    def test_noise_learned_by_heart_helps_nobody(self, tmp_path, monkeypatch):
        recipe = LMRecipe(epochs=60, lr=3e-3, patience=None, dropout=False, weight_decay=0.0)
        monkeypatch.setattr(memorising, "RECIPE", recipe)
        outcome = memorisation(self.study(tmp_path))
        (row,) = outcome.rows
        assert row["base_perplexity"] == pytest.approx(tiny.VOCAB, rel=0.05)
        assert row["train_perplexity"] < 5
        assert row["copy_against_base_on_valid"]["low"] > 2
        assert row["lmbda"] < 0.05
        assert row["perplexity"] == pytest.approx(row["base_perplexity"], rel=0.005)
        assert outcome.verdict == "holds"
        json.dumps(outcome.to_dict(), allow_nan=False)

    def test_who_had_no_time_to_overfit_decides_nothing(self, tmp_path):
        outcome = memorisation(self.study(tmp_path, lm_tokens=100))
        assert outcome.rows[0]["trained_tokens"] == 100
        assert outcome.verdict == "not decidable at this size"
        assert "decides nothing" in outcome.sentence


class TestBudget:
    def test_epochs_first_then_text(self, tmp_path):
        recipe = LMRecipe(epochs=10)

        def of(tokens):
            study = toy_study.study(tmp_path, lm_tokens=tokens)
            tokens_N, cut = language_models.budget(study, recipe)
            return len(tokens_N), cut.epochs

        assert of(None) == (6000, 10)
        assert of(60_000) == (6000, 10)
        assert of(18_000) == (6000, 3)
        assert of(2500) == (2500, 1)

    def test_a_model_is_trained_once_and_kept_as_it_was(self, toy, monkeypatch):
        first = language_models.twin(toy)
        monkeypatch.setattr(language_models, "train_lm", None)
        again = language_models.twin(toy)
        for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert str(first) == "6,000 tokens, 2 times"
        assert not first.model.training

    def test_a_fresh_model_is_another_one(self, toy):
        a, b = language_models.fresh(toy, 1), language_models.fresh(toy, 2)
        assert not torch.equal(a.transformer.wte.weight, b.transformer.wte.weight)
        assert type(a) is type(toy.model)
        assert a.config.to_dict() == toy.model.config.to_dict()


class TestBigrams:
    def test_by_hand(self):
        # 0 is followed by 1 twice and by 2 once; the last 0 by nothing; 3 never occurs.
        found = Bigrams([[0, 1, 0, 1], [0, 2, 0]], 4)
        before_N = torch.tensor([0, 0, 0, 1, 2, 3])
        tokens_N = torch.tensor([1, 2, 3, 0, 1, 0])
        probs = found.log_probs(before_N, tokens_N).exp()
        expected = torch.tensor([2 / 3, 1 / 3, 0.0, 1.0, 0.0, 4 / 7])
        torch.testing.assert_close(probs, expected)

    def test_no_pair_crosses_documents(self):
        found = Bigrams([[0, 1], [2, 3]], 4)
        assert found.log_probs(torch.tensor([1]), torch.tensor([2])).exp() == 0.25  # of all tokens

    def test_a_language_of_two_words_has_its_own_perplexity(self):
        # p(1|0) = 0.9 and p(1|1) = 0.5: word 0 stands before 5/14 of the tokens.
        random = np.random.default_rng(0).random(200_000)
        text = [0]
        for number in random:
            text.append(int(number < (0.9 if text[-1] == 0 else 0.5)))
        tokens = torch.tensor(text)
        found = Bigrams([text[:100_000]], 2).log_probs(tokens[100_000:-1], tokens[100_001:])
        entropy = 5 / 14 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) + 9 / 14 * math.log(2)
        assert -found.mean().item() == pytest.approx(entropy, rel=0.01)

    def test_nothing_to_count(self):
        found = Bigrams([[3]], 4)
        assert found.log_probs(torch.tensor([0]), torch.tensor([3])).exp() == 1


class TestEnsembling:
    def test_the_token_before_each_prediction(self):
        rows = rows_of([np.arange(10, 21), np.arange(5)], window=4, stride=2)
        tokens = torch.cat([torch.from_numpy(row.targets[-row.new :]) for row in rows])
        assert torch.equal(before(rows), tokens - 1)
        chosen = [Window(0, 3, np.array([7, 8, 9]), np.array([8, 9, 5]), 2)]
        assert before(chosen).tolist() == [8, 9]

    def test_joined_scores_mix_all_of_them(self):
        lm, a, b = torch.rand(3, 5).log()
        columns = {"tokens": torch.zeros(5).int(), "documents": torch.zeros(5).int(),
                   "context": torch.ones(5).int()}  # fmt: skip
        one = TokenScores(lm_log_probs=lm, memories=(Evidence(scores=a),), lmbdas=(0.0,), **columns)
        both = joined([one], [b])
        expected = (0.5 * lm.exp() + 0.2 * a.exp() + 0.3 * b.exp()).log()
        torch.testing.assert_close(both.log_probs((0.2, 0.3)), expected)

    def test_a_second_memory_that_knows_the_same_adds_nothing(self, toy):
        outcome = ensembling(toy)
        json.dumps(outcome.to_dict(), allow_nan=False)
        found = {row["what"]: row for row in outcome.rows}
        assert found["kNN"]["perplexity"] == pytest.approx(BEST, rel=0.1)
        for name in ("similarities", "bigram"):
            assert found[name]["perplexity"] == pytest.approx(BEST, rel=0.1)
            assert found[name]["against_without"]["low"] > 0.9
            assert len(found[name]["lmbda"]) == 2
        # The bigram model alone is as good as can be, and mixed in by itself would be too.
        words = Bigrams(toy.text("train").documents, toy.vocab_size)
        tokens = toy.evaluation("test").tokens
        alone = words.log_probs(before(toy.rows("test")), tokens)
        assert math.exp(-alone.mean().item()) == pytest.approx(BEST, rel=0.02)


class TestSoftLabels:
    def test_entry_numbers_by_hand(self):
        found = entry_numbers([[5, 6, 7], [], [8], [9, 9]])
        assert found.tolist() == [0, 1, -1, -1, 2, -1]

    def test_entries_are_those_of_the_store(self, tmp_path):
        study = Study(
            tiny.gpt2(), None, train=tiny.corpus(9), valid=[[1, 2, 3]], test=[[1, 2, 3]],
            folder=tmp_path, show=False,
        )  # fmt: skip
        text = torch.cat([torch.tensor(part) for part in tiny.corpus(9)])
        entries = entry_numbers(study.text("train").documents)
        is_entry = entries >= 0
        store = study.store()
        assert entries[is_entry].tolist() == list(range(len(store)))
        following = torch.cat([text[1:], torch.tensor([-1])])
        assert torch.equal(store.values.long(), following[is_entry])

    def test_the_model_s_own_distribution(self):
        teacher, student = tiny.gpt2(0), tiny.gpt2(1)
        tokens = torch.randint(tiny.VOCAB, (3, 9))
        batch = LMBatch(tokens, torch.tensor([0, 8, 16]))
        loss = SoftLabels(teacher, None, 0.0, torch.full((30,), -1))
        with torch.no_grad():
            p = teacher(input_ids=tokens[:, :-1]).logits.double().softmax(-1)
            q = student(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
            entropy = -(p * p.log()).sum(-1).mean().item()
            expected = -(p * q).sum(-1).mean().item()
            assert loss(student, batch).item() == pytest.approx(expected, rel=1e-5)
            assert loss(teacher, batch).item() == pytest.approx(entropy, rel=1e-5)  # the least
        value = loss(student, batch)
        value.backward()
        assert student.transformer.wte.weight.grad is not None
        assert teacher.transformer.wte.weight.grad is None

    def test_knn_s_distribution_without_the_entry_itself(self, tmp_path):
        study = toy_study.study(tmp_path)
        text = torch.tensor(study.text("train").documents[0])
        memory = retrieval.memory(study, 5.0)
        memory.k = 3
        entries = entry_numbers(study.text("train").documents)
        start = 40
        batch = LMBatch(text[None, start : start + 13].long(), torch.tensor([start]))
        loss = SoftLabels(study.model, memory, 0.25, entries)
        student = tiny.gpt2(3, vocab_size=6)
        with torch.no_grad():
            lm = study.model(input_ids=batch.tokens[:, :-1]).logits[0].log_softmax(-1)
            student_log = student(input_ids=batch.tokens[:, :-1]).logits[0].log_softmax(-1)
        keys = memory.store.keys[torch.arange(start, start + 12)].float()
        labels = []
        for i in range(12):
            near = memory.search(keys[i : i + 1], exclude=torch.tensor([start + i]))
            assert start + i not in near.ids.tolist()[0]
            knn = torch.zeros(6)
            knn.index_add_(0, near.tokens[0], (near.similarity[0] / 5.0).softmax(0))
            labels.append(mix(lm[i], [knn.log()], [0.25]).exp())
        expected = -(torch.stack(labels) * student_log).sum(-1).mean()
        with torch.no_grad():
            assert float(loss(student, batch)) == pytest.approx(expected.item(), rel=1e-3)

    def test_the_experiment(self, tmp_path):
        outcome = soft_labels(toy_study.study(tmp_path, lm_tokens=1000))
        json.dumps(outcome.to_dict(), allow_nan=False)
        found = {row["setting"]: row for row in outcome.rows}
        assert found["trained on the next token"]["against_next_token"] is None
        # The toy's own distribution is next to uniform: 1000 tokens do not even teach that.
        assert found["trained on the next token"]["base_perplexity"] == pytest.approx(6, rel=0.01)
        assert found["trained on the next token"]["perplexity"] > 6.6
        assert outcome.verdict == "not decidable at this size"
        assert "decides nothing" in outcome.sentence
        said = "of the perplexity of the one trained on the next token"
        assert outcome.sentence.count(said) == 2
        assert "kNN-LM's against the next token" in outcome.comparisons
        assert found["trained on kNN-LM's"]["trained_tokens"] == 1000


def test_a_student_of_the_next_token_learns_the_toy(toy):
    twin = language_models.twin(toy)
    assert language_models.has_converged(toy, twin)
    text = torch.tensor(toy.text("test").documents[0])[: 32 * 20 + 1].long()
    starts = torch.arange(20) * 32
    batch = LMBatch(text[starts[:, None] + torch.arange(33)], starts)
    with torch.no_grad():
        assert math.exp(next_token_loss(twin.model, batch)) < 5
