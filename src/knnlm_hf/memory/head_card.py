"""README.md of a trained head, its card on the Hub."""

from __future__ import annotations

import math
from typing import Any

from knnlm_hf import identity
from knnlm_hf.memory.recipe import Trained
from knnlm_hf.persistence import is_hub_id


def head_card(
    name: str,
    settings: dict[str, Any],
    origin: dict[str, Any] | None,
    trained: Trained | None,
    parameters: int,
    dtype: str,
) -> str:
    """The card, as Markdown with YAML metadata.

    Args:
        name: of the head's class.
        settings: the head's own.
        origin: the model whose states it reads, if it is known.
        trained: how it was trained, if it was.
        parameters: how many numbers it has.
        dtype: of these.
    """
    base = origin["id"] if origin is not None else None
    on_hub = isinstance(base, str) and is_hub_id(base)
    metadata = ["library_name: knnlm-hf", "tags:", "- knn-lm", "- knnlm-hf", "- retrieval-free"]
    if on_hub:
        metadata.append(f"base_model: {base}")
    facts = {
        "base model": identity.name(origin) if origin is not None else "not recorded",
        "layer": f"`{settings['layer']}`",
        "kind": f"`{settings['kind']}`",
        "parameters": f"{parameters:,} ({dtype})",
    }
    facts |= {name: value for name, value in settings.items() if name not in ("layer", "kind")}
    loader = f'AutoModelForCausalLM.from_pretrained("{base if on_hub else "the base model"}")'
    return f"""---
{chr(10).join(metadata)}
---

# {name}: a trained memory for a language model

Mixed into its base model it takes the place of a datastore, without retrieval:
P(w|c) = (1−λ) · P_LM(w|c) + λ · P_head(w|c).

{_table(facts)}
{_training(trained)}
```python
from transformers import AutoModelForCausalLM
from knnlm_hf import KNNLMForCausalLM, {name}

model = {loader}
knn = KNNLMForCausalLM(model, {name}.from_pretrained("this repository"), lmbda=0.25)
```

`knnlm_hf.tune` fits λ to held-out text.
"""


def _training(trained: Trained | None) -> str:
    if trained is None:
        return "\nIt was not trained, or this is not recorded.\n"
    facts = {
        "entries": f"{trained.entries:,}",
        "epochs run": trained.epochs,
        **{name: value for name, value in vars(trained.recipe).items() if name != "epochs"},
        "datastore": f"`{trained.store[:16]}`",
        **{f"teacher: {name}": value for name, value in (trained.teacher or {}).items()},
    }
    loss = trained.held_out_loss
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return f"""
## Training

On the keys and values of a datastore of the base model's states.

{_table(facts)}

## Measured

On entries of the same datastore that were held out from training, the head alone: loss {loss:.4f}
nats per token, perplexity {perplexity:,.2f}.
"""


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
