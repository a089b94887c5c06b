"""One memory's k, t and γ after the other, the λs of all together.

Shape suffixes: N token, K k, L candidate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import default_temperature
from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores
from knnlm_hf.tuning.grid import knn_probabilities
from knnlm_hf.tuning.race import contenders, sample
from knnlm_hf.tuning.shares import best_of, best_share, best_shares
from knnlm_hf.types import MOST_MATCH_WEIGHT, check_k, check_lmbdas, check_temperature

_SWEEPS = 5
DEEPEST = 80.0
"""Ratios to P_LM are taken as if no P_LM were below e^−80: they would leave float32."""
_FAR = 16
"""Factor from the scale of the evidence beyond which the grid is not around the memory's own t."""
_SAMPLE = 64
_EXTENSIONS = 4
_ENOUGH = 1 << 15
"""Tokens from which γ is fitted where there are many more: it takes a dozen grids."""
_FINER = (0.5, 0.25)
"""Steps of γ, after whole ones."""
_WORTH_IT = 1e-4
"""Nats that a t beyond the grid must gain: towards 0 and ∞ the gain only creeps to its limit."""


class Choice(NamedTuple):
    """Settings of one memory, and what it says with them."""

    temperature: float | None
    k: int | None
    match_weight: float | None
    ratio: Tensor
    """(N,) P over P_LM of each token; 1 where the memory has nothing to say."""


class _Grid(NamedTuple):
    """Settings of one memory to choose from."""

    number: int
    """Which memory."""
    lmbdas: tuple[float, ...]
    """λ of all memories, of which the others' count."""
    ks: list[int]
    temperatures: Sequence[float]
    match_weight: float | None
    """γ; None for a memory that has none."""


class _Found(NamedTuple):
    gain: float
    """Mean log-likelihood over the model's own, in nats."""
    lmbda: float
    choice: Choice
    rest: Tensor
    """(N,) P of the mixture without this memory over P_LM."""
    giver: Tensor | float
    """What λ is taken from, over P_LM: all the rest alike, or the model alone, 1."""

    @property
    def mixed(self) -> Tensor:
        """(N,) P of the mixture over P_LM."""
        return self.rest + self.lmbda * (self.choice.ratio - self.giver)


class Descent:
    """The search for the settings of lowest perplexity; see `tuning.fit`."""

    def __init__(
        self,
        scores: TokenScores,
        ks: Sequence[int] | None,
        temperatures: Sequence[float] | None,
        lmbdas: Sequence[Any] | None,
    ) -> None:
        self.memories = scores.memories
        self.match_weights: list[float | None] = [None] * len(scores.memories)
        step = len(scores) // _ENOUGH
        if step > 1 and any(found.matches is not None for found in self.memories):
            _, chosen = Descent(scores[::step], ks, temperatures, lmbdas).run()
            self.match_weights = [choice.match_weight for choice in chosen]
        self.ks = [[] if found.k is None else _candidate_ks(found.k, ks) for found in self.memories]
        self.temperatures = (
            None if temperatures is None else [*map(check_temperature, temperatures)]
        )
        self.middles = [] if self.temperatures is not None else [*map(_middle, self.memories)]
        count = len(self.memories)
        self.candidates = None if lmbdas is None else [check_lmbdas(one, count) for one in lmbdas]
        self.inverse_N = (-scores.lm_log_probs).clamp(max=DEEPEST).exp()
        silent = Choice(None, None, None, torch.ones_like(self.inverse_N))
        self.chosen = [
            silent if found.scores is None else self._fixed(found.scores) for found in self.memories
        ]

    def run(self) -> tuple[tuple[float, ...], list[Choice]]:
        """The best λs and settings."""
        lmbdas = self._shares()
        for _ in range(_SWEEPS):
            before = [choice[:3] for choice in self.chosen]
            for number, found in enumerate(self.memories):
                if found.k is not None:
                    self.chosen[number] = self._settings(number, lmbdas)
                    lmbdas = self._shares()
            if len(self.memories) == 1 or before == [choice[:3] for choice in self.chosen]:
                break
        return lmbdas, self.chosen

    def _fixed(self, scores_N: Tensor) -> Choice:
        return Choice(None, None, None, scores_N.exp() * self.inverse_N)

    def _shares(self) -> tuple[float, ...]:
        """The best λs for the settings chosen so far."""
        if self.candidates is None:
            return best_shares([choice.ratio for choice in self.chosen])
        return max(self.candidates, key=lambda lmbdas: (self._gain(lmbdas), -sum(lmbdas)))

    def _gain(self, lmbdas: Sequence[float]) -> float:
        return self.mixed(lmbdas).log().mean(dtype=torch.float64).item()

    def mixed(self, lmbdas: Sequence[float], without: int | None = None) -> Tensor:
        """(N,) P of the mixture over P_LM."""
        mixed_N = torch.ones_like(self.inverse_N)
        for number, (lmbda, choice) in enumerate(zip(lmbdas, self.chosen, strict=True)):
            if number != without and lmbda > 0:
                mixed_N += lmbda * (choice.ratio - 1)
        return mixed_N

    def _settings(self, number: int, lmbdas: tuple[float, ...]) -> Choice:
        """The best settings of one memory, its λ free, the others as they are."""
        known = self.match_weights[number]
        if known is not None or self.memories[number].matches is None:
            return self._with(known, number, lmbdas).choice
        best = self._with(0.0, number, lmbdas)
        for match_weight in range(1, int(MOST_MATCH_WEIGHT) + 1):
            further = self._with(float(match_weight), number, lmbdas)
            if further.gain <= best.gain:
                break
            best = further
        for step in _FINER:
            middle = best.choice.match_weight or 0.0
            near = [one for one in (middle - step, middle + step) if 0 <= one <= MOST_MATCH_WEIGHT]
            finer = [self._with(one, number, lmbdas) for one in near]
            best = max(best, *finer, key=_preference)
        return best.choice

    def _with(self, match_weight: float | None, number: int, lmbdas: tuple[float, ...]) -> _Found:
        """The best k and t of one memory for one γ (None: it has none)."""
        grid = _Grid(number, lmbdas, self.ks[number], self.temperatures or [], match_weight)
        if self.temperatures is not None:
            return self._best(grid)
        best = self._widely(grid)
        if best.choice.temperature and best.choice.k:
            near = [best.choice.temperature * 2 ** (step / 15) for step in range(-4, 5) if step]
            finer = self._grid(grid._replace(ks=[best.choice.k], temperatures=near))
            best = max(best, *finer, key=_preference)
        return best

    def _widely(self, grid: _Grid) -> _Found:
        """The best of ten octaves of t, and of five more while their end is the best."""
        middle = self.middles[grid.number]
        wide = [middle * 2 ** (step / 3) for step in range(-15, 15)]
        best = self._best(grid._replace(temperatures=wide))
        for _ in range(_EXTENSIONS):
            if best.choice.temperature == wide[0]:
                more = [wide[0] * 2 ** (step / 3) for step in range(-15, 0)]
                wide = [*more, *wide]
            elif best.choice.temperature == wide[-1]:
                more = [wide[-1] * 2 ** (step / 3) for step in range(1, 16)]
                wide = [*wide, *more]
            else:
                break
            further = self._best(grid._replace(temperatures=more))
            if further.gain < best.gain + _WORTH_IT:
                break
            best = further
        return best

    def _best(self, grid: _Grid) -> _Found:
        """The best of a grid, of which only what is in the running is looked at on all tokens."""
        rows_n = sample(len(self.inverse_N))
        if rows_n is not None:
            found = list(self._of(rows_n)._grid(grid))
            is_in = contenders(torch.stack([one.mixed for one in found]).log()).tolist()
            running = {one.choice.temperature for one, ok in zip(found, is_in, strict=True) if ok}
            grid = grid._replace(temperatures=[t for t in grid.temperatures if t in running])
        return max(self._grid(grid), key=_preference)

    def _of(self, rows_n: Tensor) -> Self:
        """The same search on some of the tokens."""
        part = copy.copy(self)
        part.memories = tuple(found[rows_n] for found in self.memories)
        part.inverse_N = self.inverse_N[rows_n]
        part.chosen = [choice._replace(ratio=choice.ratio[rows_n]) for choice in self.chosen]
        return part

    def _grid(self, grid: _Grid) -> Iterator[_Found]:
        """The gain for each t and k, and the best λ there."""
        number, lmbdas, ks, temperatures, match_weight = grid
        rest_N = self.mixed(lmbdas, without=number)
        candidates = self.candidates or []
        rest_LN = [self.mixed(candidate, without=number) for candidate in candidates]
        rests: list[tuple[Tensor, Tensor | float]]
        all_KN = knn_probabilities(self.memories[number], ks, temperatures, match_weight or 0.0)
        for temperature, knn_KN in zip(temperatures, all_KN, strict=True):
            # A query without hits leaves its share to the model, as if both agreed.
            ratio_KN = torch.where(knn_KN.isnan(), 1.0, knn_KN * self.inverse_N)
            if self.candidates is None:
                gain_K, lmbda_K = best_share(ratio_KN, rest_N)
                rests = [(rest_N, rest_N)] * len(ks)
            else:
                own = [candidate[number] for candidate in candidates]
                gain_K, index_K = best_of(ratio_KN, rest_LN, own).max(0)
                lmbda_K = torch.tensor(own)[index_K]
                rests = [(rest_LN[index], 1.0) for index in index_K.tolist()]
            for row, k in enumerate(ks):
                choice = Choice(temperature, k, match_weight, ratio_KN[row])
                yield _Found(gain_K[row].item(), lmbda_K[row].item(), choice, *rests[row])


def _preference(found: _Found) -> tuple[float, float]:
    """Largest gain; among equals (λ = 0, say) the smallest λ."""
    return found.gain, -found.lmbda


def _middle(found: Evidence) -> float:
    """The t to search around: the memory's own, unless a sample of its queries says otherwise."""
    if found.similarity is None:
        return found.temperature
    step = max(1, -(-len(found.similarity) // _SAMPLE))
    usual = default_temperature(found.similarity[::step])
    says_nothing = usual == 1.0
    is_near = 1 / _FAR <= usual / found.temperature <= _FAR
    return found.temperature if says_nothing or is_near else usual


def _candidate_ks(kept: int, ks: Sequence[int] | None) -> list[int]:
    if ks is None:
        return sorted({max(1, kept >> shift) for shift in (0, 1, 2, 4, 6)})
    ks = sorted({check_k(k) for k in ks})
    if ks[-1] > kept:
        raise KNNLMError(f"k {ks[-1]} asked for, but only {kept} neighbours were scored")
    return ks
