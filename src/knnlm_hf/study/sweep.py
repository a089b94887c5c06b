"""The kNN probabilities of kept scores at many temperatures, in one pass over the table.

Shape suffixes: T temperature, N token, K neighbour, H hit (a neighbour that carries the target).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.parallel import over_blocks
from knnlm_hf.scores import TokenScores
from knnlm_hf.types import check_temperature

_BLOCK = 1 << 19  # similarities of a block: 2 MB, so that it stays in cache for all temperatures


def at_temperatures(scores: TokenScores, temperatures: Sequence[float]) -> Tensor:
    """log p_kNN of every token at every temperature.

    Args:
        scores: of one memory that searched.
        temperatures: T values of t > 0.

    Returns:
        (T, N) float32; −inf where no neighbour carries the token (or one whose weight is below
        float32's smallest). A query that found nothing at all has the model's own log-probability:
        the mixture is then the model alone, whatever λ.
    """
    if len(scores.memories) != 1 or scores.memories[0].similarity is None:
        raise KNNLMError("a temperature is varied on the scores of one datastore, nothing else")
    (found,) = scores.memories
    similarity_NK, is_target_NK = found.similarity, found.is_target
    assert similarity_NK is not None
    assert is_target_NK is not None
    ts = [check_temperature(t) for t in temperatures]
    result_TN = torch.empty(len(ts), len(scores))

    def work(part: slice) -> None:
        relative_nK = similarity_NK[part] - similarity_NK[part, :1]
        relative_nK = relative_nK.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
        row_H, column_H = is_target_NK[part].nonzero(as_tuple=True)
        relative_H = relative_nK[row_H, column_H]
        weights_nK = torch.empty_like(relative_nK)
        for i, t in enumerate(ts):
            total_n = torch.mul(relative_nK, 1 / t, out=weights_nK).exp_().sum(1)
            hits_n = torch.zeros_like(total_n).index_add_(0, row_H, (relative_H / t).exp_())
            result_TN[i, part] = hits_n.log() - total_n.log()

    over_blocks(work, len(scores), max(1, _BLOCK // similarity_NK.shape[1]))
    nothing_N = similarity_NK[:, 0] == -torch.inf
    return torch.where(nothing_N, scores.lm_log_probs, result_TN)
