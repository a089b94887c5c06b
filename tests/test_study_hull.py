"""Stolen probabilities: which points are inside the hull of the others."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from knnlm_hf.errors import KNNLMError
from knnlm_hf.study import Settings, Study, hull
from knnlm_hf.study.experiments.stolen_probabilities import stolen_probabilities
from knnlm_hf.study.hull import decide

SQUARE = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]


def inside(points, bias=None):
    bias = None if bias is None else torch.tensor(bias)
    return decide(torch.tensor(points), bias, show=False).inside.tolist()


def reference(points, bias=None):
    """Weights ≥ 0 of the others that sum to 1 and give the point, and at least its bias."""
    points = np.asarray(points, dtype=np.float64)
    found = []
    for i in range(len(points)):
        others = np.delete(points, i, axis=0)
        equal = np.vstack([others.T, np.ones(len(others))])
        below, bound = None, None
        if bias is not None:
            below, bound = -np.delete(bias, i)[None], [-bias[i]]
        solved = linprog(
            np.zeros(len(others)), A_ub=below, b_ub=bound, A_eq=equal, b_eq=[*points[i], 1]
        )
        if solved.status == 0:
            found.append(i)
    return found


class TestByHand:
    def test_the_middle_of_a_square(self):
        assert inside([*SQUARE, [0.1, -0.2]]) == [4]

    def test_a_corner_moved_out_and_in(self):
        assert inside([*SQUARE, [1.2, 0.0]]) == []
        assert inside([*SQUARE, [0.99, 0.0]]) == [4]

    def test_a_point_on_an_edge_can_tie_and_never_win(self):
        assert inside([*SQUARE, [1.0, 0.0]]) == [4]

    def test_equal_points_steal_from_each_other(self):
        assert inside([*SQUARE, [1.0, 1.0]]) == [0, 4]

    def test_all_equal(self):
        assert inside([[1.0, 2.0]] * 3) == [0, 1, 2]

    def test_a_bias_lifts_the_middle_out_and_pushes_a_corner_in(self):
        points = [*SQUARE, [0.0, 0.0]]
        assert inside(points, [0.0, 0, 0, 0, 0.5]) == []
        assert inside(points, [0.0, 0, 0, 0, -0.5]) == [4]
        # A word of a very low bias still wins far enough out in its own direction.
        assert inside(points, [-9.0, 0, 0, 0, -0.5]) == [4]

    def test_many_dimensions(self):
        corners = torch.cat([torch.eye(30), -torch.eye(30)])
        middle = torch.full((1, 30), 1 / 31)  # Σ|x| < 1: inside the cross-polytope
        beyond = torch.full((1, 30), 1 / 29)
        assert decide(torch.cat([corners, middle]), show=False).inside.tolist() == [60]
        assert decide(torch.cat([corners, beyond]), show=False).inside.tolist() == []


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(2, 24), st.integers(0, 10**6), st.booleans(),
    st.sampled_from(["normal", "grid"]),
)  # fmt: skip
def test_as_the_definition_says(dim, count, seed, has_bias, kind):
    random = np.random.default_rng(seed)
    points = (
        random.integers(-2, 3, (count, dim))
        if kind == "grid"
        else random.normal(0, 1, (count, dim))
    )
    points = points.astype(np.float64)
    bias = random.normal(0, 0.5, count) if has_bias else None
    assert inside(points.tolist(), None if bias is None else bias.tolist()) == reference(
        points, bias
    )


def test_linear_programs_alone_agree_with_the_whole(monkeypatch):
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    whole = decide(points, show=False)
    assert whole.by_own_direction + whole.by_search + whole.by_program == 60
    assert whole.by_search > 0
    monkeypatch.setattr(hull, "_ROUNDS", 0)
    alone = decide(points, show=False)
    assert alone.by_search == 0
    assert alone.inside.tolist() == whole.inside.tolist()
    monkeypatch.setattr(hull, "_ADDED", 1)  # every violated constraint in a program of its own
    assert decide(points, show=False).inside.tolist() == whole.inside.tolist()


def test_without_scipy_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(KNNLMError, match=r"knnlm-hf\[study\]"):
        inside([*SQUARE, [0.0, 0.0]])
    assert inside(SQUARE) == []  # no program is needed


def test_numbers_that_are_none():
    with pytest.raises(KNNLMError, match="not finite"):
        inside([[0.0, float("nan")], [1.0, 1.0]])


class TestExperiment:
    def study(self, folder, model):
        return Study(
            model, tiny.tokenizer(), train=tiny.corpus(9, 1), valid=tiny.corpus(3, 2),
            test=tiny.corpus(3, 3), folder=folder, settings=Settings(k=4), show=False,
        )  # fmt: skip

    def test_a_model_with_one_row_inside(self, tmp_path):
        model = tiny.gpt2()
        with torch.no_grad():
            rows = model.get_output_embeddings().weight
            rows[7] = rows[[3, 8, 11]].mean(0)
        outcome = stolen_probabilities(self.study(tmp_path, model))
        (row,) = outcome.rows
        assert outcome.verdict == "does not hold"
        assert row["which"] == [7]
        assert row["tokens"] == ["w7"]
        assert "1 are inside" in outcome.sentence
        json.dumps(outcome.to_dict())

    def test_a_model_with_none(self, tmp_path):
        outcome = stolen_probabilities(self.study(tmp_path, tiny.gpt2()))
        assert outcome.verdict == "holds"
        assert outcome.rows[0]["inside"] == 0
