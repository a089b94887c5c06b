"""Keys of several shards as one mapped array."""

import gc

import tiny
import torch

from knnlm_hf import Datastore


def test_shards_that_end_on_pages_are_one_array(tmp_path):
    """64 rows of 32 float16 are a page: the shards can be mapped one behind the other."""
    items = tiny.corpus(9, longest=60)
    model = tiny.gpt2(n_embd=32)
    options = {"progress": False, "dtype": "float16"}
    whole = Datastore.build(model, items, tmp_path / "whole", **options)
    parts = Datastore.build(model, items, tmp_path / "parts", shard_size=64, **options)
    odd = Datastore.build(model, items, tmp_path / "odd", shard_size=63, **options)
    assert (len(parts.keys._parts), len(odd.keys._parts)) == (1, -(-len(odd) // 63))
    ids = torch.randint(len(whole), (3, 40))
    for store in (parts, odd):
        store.keys.prefetch()
        assert torch.equal(store.keys[:], whole.keys[:])
        assert torch.equal(store.keys[ids], whole.keys[ids])
    before = (tmp_path / "parts" / "shard-00001.safetensors").read_bytes()
    parts.keys[64:65].zero_()  # copy-on-write: the file must not change
    assert (tmp_path / "parts" / "shard-00001.safetensors").read_bytes() == before
    view = parts.keys[:]
    del parts, store
    gc.collect()
    assert torch.equal(view[:64], whole.keys[:64])  # the mapping lives as long as a view
