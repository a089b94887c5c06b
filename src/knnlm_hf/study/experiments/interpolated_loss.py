"""Row 17: whether a head should be trained on what it is used for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from knnlm_hf.interpolation import mix
from knnlm_hf.memory.entries import Batch
from knnlm_hf.memory.head import Head
from knnlm_hf.memory.multi_embedding import MultiEmbeddingHead
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.memory.training import train
from knnlm_hf.study import heads
from knnlm_hf.study.cost import forward_seconds
from knnlm_hf.study.experiments.number_of_embeddings import measured
from knnlm_hf.study.measure import Measured, against
from knnlm_hf.study.outcome import Outcome
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import no_gain

_USUAL_LMBDA = 0.25


def interpolated_loss(study: Study) -> Outcome:
    """A head trained on the interpolated loss.

    Row: 17

    Section: 4

    Hypothesis: does a trained matrix fall short of kNN because it is trained to predict by itself?
    Then −log of the mixture with the model, λ fixed, would be the better loss to train it on.

    Finding: no notable gain over the head's own loss.
    """
    layer = study.layers[0]
    own = measured(study, layer, 1)
    lmbda = round(own.tuned.lmbda, 3) if own.tuned.helps else _USUAL_LMBDA
    mixed = _head(study, layer, lmbda)
    gain = against(study, mixed, own)
    rows = [
        one.row(loss=loss, against_base=against(study, one).to_dict(), **more)
        for one, loss, more in (
            (own, "its own", {}),
            (mixed, "interpolated", {"trained_lmbda": lmbda, "against_own": gain.to_dict()}),
        )
    ]
    return Outcome(
        rows=rows,
        verdict=no_gain(gain, fair=not heads.is_cut(study)),
        sentence=(
            f"Trained on the interpolated loss (λ {lmbda:.2f}) one row per word on {layer} gives "
            f"{mixed.perplexity:.2f}, trained on its own loss {own.perplexity:.2f} ({gain}), from "
            f"{own.test.base_perplexity:.2f}; a gain counts from half a percent; "
            f"{heads.said_of(study)}."
        ),
        comparisons={"interpolated loss against its own": gain},
    )


def cost(study: Study) -> float:
    """Seconds: one head, its logits computed twice, and the model's own say on its entries."""
    seen = sum(row.new for row in heads.train_rows(study))
    training = heads.seconds(study, study.vocab_size * 4 / 3)
    return training + 2 * forward_seconds(study, seen)


def mixture_loss(head: Head, batch: Batch, lm_N: Tensor, lmbda: float) -> Tensor:
    """Mean −log((1−λ)·P_LM + λ·P_head) of a batch, in nats, for training.

    Its gradient is that of −r · log P_head, where r = λ·P_head / mixture is the head's share.

    Args:
        head: whose `forward` takes weights.
        batch: keys, tokens and numbers of entries.
        lm_N: log P_LM of each entry's token, by its number.
        lmbda: λ, 0 < λ < 1.
    """
    with torch.no_grad():
        own_Q = head.token_log_probs(batch.keys, batch.tokens)
        lm_Q = lm_N[batch.ids].to(own_Q)
        mixed_Q = mix(lm_Q, [own_Q], [lmbda])
        share_Q = (own_Q - mixed_Q).exp() * lmbda
    value: Tensor = head(batch.keys, batch.tokens[:, None], share_Q[:, None])
    return value - value.detach() - mixed_Q.mean()


def _head(study: Study, layer: str, lmbda: float) -> Measured:
    lm_n = heads.lm_log_probs(study)

    def fit(entries: heads.ChosenEntries, how: Recipe) -> Head:
        lm_N = torch.zeros(len(entries))
        lm_N[entries.nth_live(torch.arange(entries.live))] = lm_n
        torch.manual_seed(how.seed)
        head = MultiEmbeddingHead(entries.dim, entries.vocab_size, n=1, layer=layer)
        head.to(heads.device())
        head.origin = entries.manifest.model
        loss = partial(mixture_loss, head, lm_N=lm_N, lmbda=lmbda)
        head.trained = train(head, entries, how, loss=loss, progress=study.show)
        return head

    trained = heads.fitted(study, layer, "mixed-loss", {"lmbda": lmbda}, fit)
    return heads.measured(study, f"interpolated loss, λ {lmbda:.2f}", trained)
