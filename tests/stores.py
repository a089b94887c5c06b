"""Datastores of given keys, written without a model."""

import numpy as np
import torch

from knnlm_hf import Datastore
from knnlm_hf.datastore import Manifest, StoreWriter
from knnlm_hf.datastore.ledger import Ledger
from knnlm_hf.windows import Document

MODEL = {
    "id": None, "revision": None, "architecture": "GPT2LMHeadModel", "config": {}, "weights": {},
    "tokenizer": None,
}  # fmt: skip


def write(folder, items, keys, vocab_size=50, shard_size=100, layer="att"):
    """A store of these documents (token lists), whose entries have these keys."""
    settings = {"window": 8, "stride": 4, "batch_size": 2, "bos": False, "model": MODEL}
    dtype = str(keys.dtype).removeprefix("torch.")
    manifest = Manifest(
        layer=layer, dim=keys.shape[1], dtype=dtype, vocab_size=vocab_size, shard_size=shard_size,
        **settings,
    )  # fmt: skip
    folder.mkdir()
    manifest.save(folder)
    writer = StoreWriter(folder, manifest)
    ledger = Ledger(shard_size, lambda i, text: writer.put(text))
    documents = (Document(i, np.array(item, dtype=np.int32)) for i, item in enumerate(items))
    for _ in ledger.read(documents):
        pass
    ledger.finish()
    writer.append(keys)
    writer.finish(ledger.documents)
    return Datastore.open(folder)


def random(folder, *, lengths=(40,) * 16, dim=16, seed=0, **options):
    """Documents of so many entries, each a cluster of its own; document 3 and 4 have none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [*lengths[:3], 0, 0, *lengths[3:]]
    items = [torch.randint(50, (n + 1,), generator=generator).tolist() for n in lengths]
    centres = 4 * torch.randn(len(lengths), dim, generator=generator)
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    keys = centres[owners] + torch.randn(len(owners), dim, generator=generator)
    return write(folder, items, keys, **options)
