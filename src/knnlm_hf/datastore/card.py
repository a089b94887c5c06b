"""README.md of a datastore, its card on the Hub: equal for equal stores."""

from __future__ import annotations

import re

from knnlm_hf import identity
from knnlm_hf.datastore.manifest import Manifest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def card(manifest: Manifest, entries: int, documents: int) -> str:
    """The card of a store with so many entries and documents, as Markdown with YAML metadata."""
    model = manifest.model["id"]
    on_hub = isinstance(model, str) and _HUB_ID.fullmatch(model) is not None
    metadata = ["tags:", "- knn-lm", "- datastore", "- knnlm-hf"]
    if on_hub:
        metadata.append(f"base_model: {model}")
    origin = ""
    if manifest.subsample is not None:
        fraction = manifest.subsample["fraction"]
        origin = f"\nA uniform sample of another datastore's entries (fraction {fraction}).\n"
    return f"""---
{chr(10).join(metadata)}
---

# kNN-LM datastore

{entries:,} entries of {documents:,} documents: the hidden state of a language model before each
token, and the token.
{origin}
| | |
|---|---|
| model | {identity.name(manifest.model)} |
| layer | `{manifest.layer}` |
| keys | {manifest.dim} × {manifest.dtype} |
| window, stride | {manifest.window}, {manifest.stride} tokens |

```python
from transformers import AutoModelForCausalLM
from knnlm_hf import Datastore, KNNLMForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model if on_hub else "the model named above"}")
knn = KNNLMForCausalLM(model, Datastore.open("this repository"), lmbda=0.25)
```
"""
