"""CentroidMemory: the datastore compressed to the means of its keys.

    p(w | h) = Σ_j softmax_j(−‖h − c_j‖² / t + m_j) · p_j(w)

The c_j are k-means centroids of the keys, and p_j(w) is how much of the entries of centroid j has
token w, each entry weighted alike, by its inverse distance, or by a softmax of its distance (the
paper's section 4 tries such centroids, and trains them on). m_j is the log of the number of
entries, so that a centroid counts as much as the entries it stands for, or 0. Only tokens that a
centroid has are kept, ordered by token: a pair says which centroid has it, and log p_j(w).

Shape suffixes: Q query, J centroid, P pair, D dimension, V vocabulary, T target, U unlike targets.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint as recomputed

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.entries import Entries
from knnlm_hf.memory.head import Head, exact
from knnlm_hf.memory.recipe import Recipe, Trained
from knnlm_hf.memory.soft_counts import (
    PRIORS,
    WEIGHTS,
    Compressed,
    compress,
    is_table,
    log_sums,
)
from knnlm_hf.memory.training import held_out_loss, train
from knnlm_hf.types import check_count, check_temperature

_CHUNK = 1 << 22  # queries × targets × centroids at a time, in training
_TEMPERATURE_QUERIES = 1024


class CentroidMemory(Head):
    """A memory of J centroids, each with a distribution over tokens; see the module's formula.

    Made from a datastore by `train_on`; the constructor alone gives one that knows nothing.

    Args:
        hidden_size: D, the width of the captured states.
        vocab_size: V.
        clusters: J ≥ 1; fewer where the keys do not have as many.
        layer: the representation it reads, as for a datastore.
        weights: of an entry in its centroid's distribution: `counts` (1 each), `inverse`
            (1 / distance) or `softmax` (exp(−distance² / t)).
        prior: m, `counts` or `uniform`.
        temperature: t > 0; None: the one that suits held-out entries best.
        iterations: rounds of k-means.
        per_cluster: of the entries, at most so many for each cluster are used to find the
            centroids; all have their share in the distributions.
        fine_tune: `train_on` goes on to train centroids, m, distributions and temperature on the
            store's next tokens (or with a teacher); otherwise the recipe's seed alone counts.
        pairs: how many (token, centroid) pairs it has; `train_on` finds out.

    Raises:
        SettingError: a size below 1, a name that is none of these, t ≤ 0.
    """

    kind = "centroids"
    pair_centroids: Tensor
    token_starts: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        clusters: int = 4096,
        layer: str = "att",
        *,
        weights: str = "counts",
        prior: str = "counts",
        temperature: float | None = None,
        iterations: int = 10,
        per_cluster: int = 64,
        fine_tune: bool = False,
        pairs: int = 0,
    ) -> None:
        super().__init__(hidden_size, vocab_size, layer)
        self.clusters = check_count("clusters", clusters)
        self.iterations = check_count("iterations", iterations)
        self.per_cluster = check_count("per_cluster", per_cluster)
        for name, value, known in (("weights", weights, WEIGHTS), ("prior", prior, PRIORS)):
            if value not in known:
                raise SettingError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.weights, self.prior, self.fine_tune = weights, prior, fine_tune
        self._finds_temperature = temperature is None
        self._may_have_moved = False
        t = 1.0 if temperature is None else check_temperature(temperature)
        log_t = torch.tensor(t, device="cpu").log()
        self.centroids = nn.Parameter(torch.zeros(clusters, hidden_size))
        self.log_mass = nn.Parameter(torch.zeros(clusters))
        self.log_weights = nn.Parameter(torch.zeros(pairs))
        self.log_temperature = nn.Parameter(log_t)
        self.register_buffer("pair_centroids", torch.zeros(pairs, dtype=torch.int32))
        self.register_buffer("token_starts", torch.zeros(vocab_size + 1, dtype=torch.int64))

    def settings(self) -> dict[str, Any]:
        """`kind` and the constructor's arguments but t, which is learned, as plain data."""
        names = ("clusters", "weights", "prior", "iterations", "per_cluster", "fine_tune")
        own = {name: getattr(self, name) for name in names}
        return super().settings() | own | {"pairs": len(self.log_weights)}

    @property
    def temperature(self) -> float:
        """t, in units of the squared distance."""
        return float(self.log_temperature.detach().double().exp())

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        with torch.no_grad():
            self.log_temperature.fill_(torch.tensor(check_temperature(temperature)).log())

    def train(self, mode: bool = True) -> Self:
        """As for any module; the distributions that training moved sum to 1 again after it."""
        if self._may_have_moved and not mode:
            with torch.no_grad():
                self.log_weights.copy_(self._normalised())
            self._may_have_moved = False
        return super().train(mode)

    def forward(self, hidden: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, for training; what is large is recomputed for the gradient.

        Args:
            hidden: (..., D) states.
            tokens: (...) next tokens; with weights (..., T), several targets of each state.
            weights: (..., T) ≥ 0, how much each target counts; 0 for one that only fills the row.

        Raises:
            KNNLMError: a token that no centroid has, which has no likelihood to train.
        """
        tokens_QT, hidden_QD = self._targets(tokens, weights, hidden), self._flat(hidden)
        is_known_QT = self.token_starts[tokens_QT] < self.token_starts[tokens_QT + 1]
        if not bool(is_known_QT.all()):
            token = int(tokens_QT[~is_known_QT][0])
            raise KNNLMError(f"no centroid has token {token}: train on a store where it occurs")
        self._may_have_moved = self.training
        weights_QT = torch.ones_like(tokens_QT) if weights is None else weights
        weights_QT = weights_QT.reshape(tokens_QT.shape).to(hidden_QD.device)
        log_weights_P = self._normalised()
        step = max(1, _CHUNK // (tokens_QT.shape[1] * self.clusters))
        inputs = (hidden_QD, tokens_QT, weights_QT)
        total = torch.zeros((), device=hidden_QD.device)
        for rows in zip(*(torch.split(x, step) for x in inputs), strict=True):
            part: Any = recomputed(self._summed_loss, *rows, log_weights_P, use_reentrant=False)
            total = total + part
        return total / max(1, len(tokens_QT))

    @property
    def _width(self) -> int:
        return max(self.clusters, self.vocab_size)

    def _log_probs(self, hidden_QD: Tensor) -> Tensor:
        shares_QJ = self._logits(hidden_QD).softmax(1)
        probs_VQ = embedding_bag(
            self.pair_centroids, shares_QJ.T.contiguous(), self.token_starts.to(torch.int32),
            mode="sum", per_sample_weights=exact(self._normalised()).exp(),
            include_last_offset=True,
        )  # fmt: skip
        is_nothing_QV = probs_VQ.T == 0
        return probs_VQ.T.masked_fill(is_nothing_QV, 1).log().masked_fill(is_nothing_QV, -torch.inf)

    def _token_log_probs(self, hidden_QD: Tensor, tokens_Q: Tensor) -> Tensor:
        logits_QJ = self._logits(hidden_QD)
        return self._own(logits_QJ, tokens_Q[:, None], self._normalised())[:, 0]

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        """(Q, J): −‖h − c‖² / t + m, less what is the same for all centroids."""
        with torch.autocast(hidden_QD.device.type, enabled=False):  # differences of large numbers
            centroids_JD, hidden_QD = exact(self.centroids), exact(hidden_QD)
            relative_QJ = 2 * hidden_QD @ centroids_JD.T - centroids_JD.square().sum(1)
            return relative_QJ / exact(self.log_temperature).exp() + exact(self.log_mass)

    def _own(self, logits_QJ: Tensor, tokens_QT: Tensor, log_weights_P: Tensor) -> Tensor:
        """(Q, T) log p of the targets; −inf for one that no centroid has."""
        tokens_U, at_QT = torch.unique(tokens_QT, return_inverse=True)
        first_U, last_U = self.token_starts[tokens_U], self.token_starts[tokens_U + 1]
        row_p = torch.arange(len(tokens_U), device=first_U.device)
        row_p = row_p.repeat_interleave(last_U - first_U)
        before_U = (last_U - first_U).cumsum(0) - (last_U - first_U)
        pair_p = torch.arange(len(row_p), device=row_p.device) - (before_U - first_U)[row_p]
        log_p_UJ = logits_QJ.new_full((len(tokens_U), self.clusters), -torch.inf)
        own_p = exact(log_weights_P)[pair_p].to(logits_QJ.dtype)
        log_p_UJ = log_p_UJ.index_put((row_p, self.pair_centroids[pair_p].long()), own_p)
        joint_QTJ = logits_QJ[:, None] + log_p_UJ[at_QT]
        return joint_QTJ.logsumexp(2) - logits_QJ.logsumexp(1, keepdim=True)

    def _summed_loss(
        self, hidden_QD: Tensor, tokens_QT: Tensor, weights_QT: Tensor, log_weights_P: Tensor
    ) -> Tensor:
        own_QT = self._own(self._logits(hidden_QD), tokens_QT, log_weights_P)
        return -(weights_QT * own_QT).sum()

    def _normalised(self) -> Tensor:
        """(P,) log p_j(w). Outside training they are so already."""
        if not self.training:
            return self.log_weights
        of_pair_P = self.pair_centroids.long()
        return self.log_weights - log_sums(self.log_weights, of_pair_P, self.clusters)[of_pair_P]

    def _fit(self, store: DatastoreReader, recipe: Recipe, **options: Any) -> Trained:
        if options.get("teacher") is not None and not self.fine_tune:
            raise SettingError("a teacher has nothing to teach centroids without fine_tune=True")
        entries = Entries(store, recipe.seed)
        given = None if self._finds_temperature else self.temperature
        found = compress(
            entries, self.clusters, weights=self.weights, temperature=given,
            iterations=self.iterations, per_cluster=self.per_cluster, seed=recipe.seed,
            device=self.device, progress=options["progress"],
        )  # fmt: skip
        self._take(found)
        self.eval()
        if given is None:
            self._find_temperature(entries, found.spread)
        if self.fine_tune:
            return train(self, store, recipe, **options)
        loss = held_out_loss(self, entries, recipe.batch_size)
        return Trained(recipe, 0, loss, len(entries), store.digest)

    def _take(self, found: Compressed) -> None:
        """Become what was found."""
        self.clusters = len(found.centroids)
        log_mass_J = found.counts.float().log() * (self.prior == "counts")
        for name, tensor in (
            ("centroids", found.centroids), ("log_mass", log_mass_J),
            ("log_weights", found.log_weights),
        ):  # fmt: skip
            setattr(self, name, nn.Parameter(tensor.to(self.device)))
        self.pair_centroids = found.pair_centroids.to(self.device)
        self.token_starts = found.token_starts.to(self.device)

    @torch.no_grad()
    def _find_temperature(self, entries: Entries, spread: float) -> None:
        """Take the t at which a sample of the held-out entries is most probable."""
        ids = entries.held_out_ids
        ids_Q = ids[:: max(1, len(ids) // _TEMPERATURE_QUERIES)]
        keys_QD = entries.store.keys[ids_Q].float()
        tokens_Q = entries.store.values[ids_Q].long()

        def best(candidates: list[float]) -> float:
            losses = []
            for self.temperature in candidates:
                losses.append(float(self(keys_QD, tokens_Q)))
            return candidates[losses.index(min(losses))]

        near = best([(spread or 1.0) * 2 ** (step / 2) for step in range(-14, 5)])
        self.temperature = best([near * 2 ** (step / 8) for step in range(-3, 4)])

    @classmethod
    def _blank(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if not is_table(tensors["token_starts"], tensors["pair_centroids"], settings["clusters"]):
            raise SettingError("its table of tokens and centroids is damaged")
        return super()._blank(settings, tensors)
