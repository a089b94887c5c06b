"""Keys of several shards as one mapped array."""

import gc

import tiny
import torch

from knnlm_hf import Datastore
from knnlm_hf.datastore import atomic, writer
from knnlm_hf.datastore.manifest import DATA_START
from knnlm_hf.datastore.mapping import HUGE_PAGE


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


def test_keys_can_lie_in_huge_pages(tmp_path, monkeypatch):
    """Written in whole ones, and as far from one's beginning in memory as in the file."""
    items, model = tiny.corpus(9, longest=60), tiny.gpt2(n_embd=32)
    options = {"progress": False, "dtype": "float16", "batch_size": 2}
    whole = Datastore.build(model, items, tmp_path / "whole", **options)
    assert whole.keys[:].data_ptr() % HUGE_PAGE == DATA_START

    page, written = 3000, []
    monkeypatch.setattr(writer, "HUGE_PAGE", page)
    write_all = atomic.write_all

    def noting(file, data):
        if isinstance(data, (memoryview, bytearray)):  # keys
            written.append(len(data))
        write_all(file, data)

    monkeypatch.setattr(atomic, "write_all", noting)
    pieces = Datastore.build(model, items, tmp_path / "pieces", **options)
    name = whole.manifest.shards[0].file
    assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    full, rest = divmod(DATA_START + whole.keys[:].nbytes, page)
    assert len(written) > 2
    assert all(size % page == 0 for size in written[:-1])
    assert (sum(written[:-1]), written[-1]) == (full * page, rest)
    assert torch.equal(pieces.keys[:], whole.keys[:])


def test_a_whole_shard_ends_where_a_huge_page_may(tmp_path):
    """Whatever D is, so that the next shard lies in huge pages too."""
    store = Datastore.build(tiny.gpt2(), tiny.corpus(2), tmp_path / "s", progress=False)
    assert store.manifest.shard_size * 2 % HUGE_PAGE == 0
