"""Building against plain forward passes with a plain hook, one window at a time."""

import json
import threading

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory
from knnlm_hf.errors import (
    CaptureError,
    CorpusError,
    DatastoreError,
    KNNLMError,
    ModelMismatchError,
    PersistenceError,
    SettingError,
)
from knnlm_hf.forwards import can_share

ITEMS = tiny.corpus(seed=3)
GENERATOR = torch.Generator().manual_seed(0)
VARIED = [  # no beginning comes twice, so that no two entries have equal keys
    [i, *torch.randint(61, (len(item) - 1,), generator=GENERATOR).tolist()] if item else []
    for i, item in enumerate(ITEMS)
]
COUNT = sum(max(0, len(item) - 1) for item in ITEMS)


def build(path, model=None, items=ITEMS, **options):
    settings = {"window": 16, "stride": 6, "batch_size": 3, "shard_size": 50, "progress": False}
    return Datastore.build(model or tiny.gpt2(), items, path, **{**settings, **options})


def reference_keys(model, module, side, items, window=16, stride=6):
    """State before each token: windows by definition, one forward each, a plain hook."""
    caught = []
    if side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: caught.append(out))
    rows = []
    for item in items:
        for target in range(1, len(item)):
            start = 0
            while start + window < target:
                start += stride
            with torch.no_grad():
                model(torch.tensor([item[start : start + window]]))
            out = caught.pop()
            out = out[0] if isinstance(out, tuple) else out
            rows.append(out.reshape(-1, out.shape[-1])[target - 1 - start])
    handle.remove()
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("layer", "place", "side"),
    [
        ("att", "transformer.h.1.mlp", "input"),
        ("ffn", "transformer.h.1", "output"),
        ("final", "lm_head", "input"),
        ("transformer.h.0.mlp", "transformer.h.0.mlp", "output"),
    ],
)
def test_keys_and_values_are_the_states_and_tokens(tmp_path, layer, place, side):
    model = tiny.gpt2()
    store = build(tmp_path / "s", model, layer=layer, dtype="float32")
    assert len(store) == COUNT
    assert store.values.tolist() == [token for item in ITEMS for token in item[1:]]
    expected = reference_keys(model, model.get_submodule(place), side, ITEMS)
    torch.testing.assert_close(store.keys[:], expected, rtol=1e-4, atol=1e-4)
    owners = [i for i, item in enumerate(ITEMS) for _ in item[1:]]
    assert store.document(torch.arange(COUNT)).tolist() == owners
    store.verify()


@pytest.mark.parametrize(
    "model",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=2)),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2)),
    ],
)
def test_padding_does_not_reach_the_keys(tmp_path, model):
    torch.manual_seed(0)
    model = model().eval()
    alone = build(tmp_path / "a", model, layer="final", dtype="float32", batch_size=1)
    padded = build(tmp_path / "b", model, layer="final", dtype="float32", batch_size=7)
    torch.testing.assert_close(alone.keys[:], padded.keys[:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keys_are_the_rounded_ones(tmp_path, dtype):
    full = build(tmp_path / "full", dtype="float32")
    half = build(tmp_path / "half", dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    assert torch.equal(half.keys[:], full.keys[:].to(half.dtype))


def test_a_bfloat16_model(tmp_path):
    model = tiny.gpt2().to(torch.bfloat16)
    full = build(tmp_path / "s", model, dtype="bfloat16")
    store = build(tmp_path / "full", dtype="float32")
    torch.testing.assert_close(full.keys[:].float(), store.keys[:], rtol=0.1, atol=0.2)
    store.check_model(model)


def test_text_is_tokenised_and_the_tokenizer_kept(tmp_path):
    tokenizer = tiny.tokenizer()
    texts = tiny.text(ITEMS)
    store = build(tmp_path / "s", items=texts, tokenizer=tokenizer)
    assert store.values.tolist() == build(tmp_path / "ids").values.tolist()
    again = Datastore.open(tmp_path / "s").tokenizer
    assert again("w5 w6").input_ids == [5, 6]
    assert build(tmp_path / "ids").tokenizer is None
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts))
    whole = build(tmp_path / "file", items=str(path), tokenizer=tokenizer)
    assert whole.values.tolist() == [token for item in ITEMS for token in item][1:]
    assert whole.documents == 1


def test_bos_makes_the_first_token_an_entry(tmp_path):
    items = [[5, 6, 7], [], [0, 8]]
    store = build(tmp_path / "s", items=items, bos=True)
    assert store.values.tolist() == [5, 6, 7, 8]
    assert store.document(torch.arange(4)).tolist() == [0, 0, 0, 2]


def test_model_by_path_and_saved_folder(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    store = build(tmp_path / "s", str(tmp_path / "model"), items=tiny.text(ITEMS))
    assert torch.equal(store.keys[:], build(tmp_path / "t").keys[:])
    assert store.manifest.model["id"] == str(tmp_path / "model")
    with pytest.raises(PersistenceError, match="nowhere"):
        build(tmp_path / "u", str(tmp_path / "nowhere"))


def test_training_mode_is_off_and_put_back(tmp_path):
    model = tiny.gpt2(resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    store = build(tmp_path / "s", model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(store.keys[:], build(tmp_path / "t", tiny.gpt2()).keys[:])


def test_nothing_after_the_layer_is_computed(tmp_path):
    model = tiny.gpt2()
    calls = []
    model.lm_head.register_forward_hook(lambda *a: calls.append("head"))
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *a: calls.append("mlp"))
    build(tmp_path / "s", model)
    assert calls == []


def test_a_finished_store_of_the_same_settings_is_returned(tmp_path, monkeypatch):
    one = build(tmp_path / "s")
    model = tiny.gpt2()
    monkeypatch.setattr(model, "forward", None)  # no forward pass is needed
    assert build(tmp_path / "s", model).digest == one.digest


def test_anything_else_than_the_same_build_is_refused(tmp_path):
    build(tmp_path / "s")
    before = {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()}
    cases = [
        (lambda: build(tmp_path / "s", layer="ffn"), "'att'.*'ffn'"),
        (lambda: build(tmp_path / "s", dtype="float32"), "'float16'.*'float32'"),
        (lambda: build(tmp_path / "s", window=8), "window 16.* 8"),
        (lambda: build(tmp_path / "s", shard_size=51), "50.*51"),
        (lambda: build(tmp_path / "s", bos=True), "bos"),
        (lambda: build(tmp_path / "s", resume=False), "delete it"),
        (lambda: build(tmp_path / "s", items=[*ITEMS, [1, 2]]), "goes on"),
        (lambda: build(tmp_path / "s", items=ITEMS[:-1]), "ends after"),
        (lambda: build(tmp_path / "s", items=ITEMS[1:]), "corpus"),
        (lambda: build(tmp_path / "s", items=[*ITEMS, []]), "documents are divided"),
        (lambda: build(tmp_path / "s", items=[*ITEMS[:-1], [9, *ITEMS[-1][1:]]]), "first token"),
    ]
    for attempt, message in cases:
        with pytest.raises(DatastoreError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelMismatchError, match="weights changed"):
        build(tmp_path / "s", tiny.gpt2(seed=1))
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()}


def test_a_changed_corpus_names_the_place(tmp_path):
    items = [list(item) for item in ITEMS]
    build(tmp_path / "s", items=items)
    document = next(i for i, item in enumerate(items) if len(item) > 20)
    entry = sum(max(0, len(item) - 1) for item in items[:document]) + 9
    old = items[document][10]
    items[document][10] = (old + 1) % 61
    place = rf"entry {entry} \(document {document}\).*token {old}"
    with pytest.raises(DatastoreError, match=place):
        build(tmp_path / "s", items=items)


def test_check_model(tmp_path):
    store = build(tmp_path / "s")
    store.check_model(tiny.gpt2())
    store.check_model(tiny.gpt2().half())
    with pytest.raises(ModelMismatchError, match=r"hidden_size was 24, is 26"):
        store.check_model(tiny.gpt2(n_embd=26))
    with pytest.raises(ModelMismatchError, match="weights changed"):
        store.check_model(tiny.gpt2(seed=5))


def poisoned(value):
    model = tiny.gpt2()

    def change(module, args):
        hidden = args[0].clone()
        hidden[(model.ids == 60).nonzero(as_tuple=True)] = value
        return (hidden,)

    def remember(module, args, kwargs):
        model.ids = kwargs["input_ids"]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.transformer.h[1].mlp.register_forward_pre_hook(change)
    return model


ODD_ONE = [[1, 2, 3], [4] * 30 + [60, 5, 6]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_no_number_is_refused(tmp_path, value):
    for dtype in ("float32", "float16"):
        with pytest.raises(DatastoreError, match=r"document 1, token 31.*NaN or infinite"):
            build(tmp_path / "s", poisoned(value), items=ODD_ONE, dtype=dtype)
        assert not (tmp_path / "s").exists()


def test_a_state_too_large_for_float16_is_refused(tmp_path):
    with pytest.raises(DatastoreError, match=r"document 1, token 31.*1e\+05.*bfloat16"):
        build(tmp_path / "s", poisoned(1e5), items=ODD_ONE)
    store = build(tmp_path / "t", poisoned(1e5), items=ODD_ONE, dtype="bfloat16")
    assert (store.keys[:] > 9e4).any(dim=1).sum() == 1


BAD = [
    ({"window": 0}, SettingError),
    ({"window": 33}, SettingError),
    ({"stride": 17}, SettingError),
    ({"batch_size": 0}, SettingError),
    ({"shard_size": 0}, SettingError),
    ({"shard_size": 1.5}, SettingError),
    ({"dtype": "int8"}, SettingError),
    ({"layer": "nowhere"}, CaptureError),
    ({"items": []}, CorpusError),
    ({"items": [[1], []]}, CorpusError),
    ({"items": [[1, 61]]}, CorpusError),
    ({"items": "missing.txt"}, CorpusError),
    ({"items": ["w1 w2"]}, CorpusError),
]


@pytest.mark.parametrize(("options", "error"), BAD)
def test_bad_arguments_leave_nothing_behind(tmp_path, options, error):
    with pytest.raises(error) as caught:
        build(tmp_path / "deep" / "s", **options)
    assert isinstance(caught.value, KNNLMError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep" / "s").exists()


def test_the_card_names_the_base(tmp_path):
    model = tiny.gpt2()
    model.config._name_or_path = "someone/model"
    text = (build(tmp_path / "s", model).path / "README.md").read_text()
    assert text.startswith("---\n")
    assert "base_model: someone/model" in text
    assert "- knn-lm" in text
    assert f"{COUNT:,} entries of {len(ITEMS)} documents" in text
    local = (build(tmp_path / "t").path / "README.md").read_text()
    assert "base_model" not in local


@pytest.mark.parametrize(("fraction", "count"), [(0.3, round(0.3 * COUNT)), (1, COUNT), (1e-9, 1)])
def test_subsample(tmp_path, fraction, count):
    store = build(tmp_path / "s", items=VARIED, dtype="float32")
    sample = store.subsample(fraction, tmp_path / "a", seed=4)
    again = store.subsample(fraction, tmp_path / "b", seed=4)
    assert len(sample) == count
    sample.verify()
    files = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}
    # Which entries were drawn is seen from the keys, which are all different.
    where = {tuple(key): i for i, key in enumerate(store.keys[:].tolist())}
    drawn = [where[tuple(key)] for key in sample.keys[:].tolist()]
    assert drawn == sorted(set(drawn))
    assert sample.values.tolist() == store.values[drawn].tolist()
    owners = [store.document(i) for i in drawn]
    assert [sample.document(i) for i in range(count)] == owners
    assert sample.documents == store.documents
    assert again.digest == sample.digest
    assert sample.manifest.subsample == {"parent": store.digest, "fraction": fraction, "seed": 4}
    with pytest.raises(DatastoreError, match="drawn from"):
        sample.context(0)
    with pytest.raises(DatastoreError, match="subsample"):
        build(tmp_path / "a", items=VARIED, dtype="float32")


def test_subsamples_are_uniform_and_differ_by_seed(tmp_path):
    store = build(tmp_path / "s", items=VARIED)
    drawn = np.zeros(COUNT)
    where = {tuple(key): i for i, key in enumerate(store.keys[:].tolist())}
    for seed in range(20):
        sample = store.subsample(0.5, tmp_path / str(seed), seed=seed)
        for key in sample.keys[:].tolist():
            drawn[where[tuple(key)]] += 1
    assert drawn.min() >= 1
    assert drawn.max() <= 19  # each of 20 coins, and none always shows the same


def test_bad_subsamples(tmp_path):
    store = build(tmp_path / "s")
    for fraction in (0, -1, 1.1, float("nan")):
        with pytest.raises(SettingError):
            store.subsample(fraction, tmp_path / "a")
    with pytest.raises(DatastoreError, match="exists"):
        store.subsample(0.5, tmp_path / "s")
    (tmp_path / "file").touch()
    with pytest.raises(DatastoreError, match="cannot write"):
        store.subsample(0.5, tmp_path / "file" / "s")
    assert not (tmp_path / "a").exists()


def test_the_manifest_holds_no_time_and_no_machine(tmp_path):
    text = (build(tmp_path / "s").path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["entries"] == COUNT


def test_the_saved_tokenizer_loads_by_itself(tmp_path):
    build(tmp_path / "s", items=tiny.text(ITEMS), tokenizer=tiny.tokenizer())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "s" / "tokenizer")) == 61


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def passing(model, notes, note=lambda: threading.current_thread().name):
    """Note something of every forward that passes the last layer, without a hook."""
    inner = model.transformer.h[1].ln_2.forward

    def forward(hidden):
        notes.add(note())
        return inner(hidden)

    model.transformer.h[1].ln_2.forward = forward
    return model


def test_two_halves_of_a_batch_side_by_side_give_the_same_keys(tmp_path, two_threads):
    names = set()
    two = build(tmp_path / "two", passing(tiny.gpt2(), names), batch_size=5)
    assert len(names) == 3  # the first batch is the caller's own
    torch.set_num_threads(1)
    one = build(tmp_path / "one", batch_size=5)
    assert torch.equal(two.values, one.values)
    torch.testing.assert_close(two.keys[:], one.keys[:], rtol=0, atol=2e-3)


def test_a_wrapper_retrieves_in_none_of_the_threads(tmp_path, two_threads):
    store, notes = build(tmp_path / "store"), set()
    knn = KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store, k=3))
    passing(knn, notes, lambda: (threading.current_thread().name, knn.retrieves))
    again = build(tmp_path / "again", knn)
    assert len(notes) == 3
    assert not any(retrieves for _, retrieves in notes)
    assert torch.equal(again.keys[:], store.keys[:])


def test_rotary_frequencies_that_follow_the_length_are_one_thread_s(tmp_path, two_threads):
    """transformers writes them into the model in every forward."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    options = {**sizes, "vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    for rope in (
        {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0, **factors},
        {"rope_type": "dynamic", "factor": 4.0},
    ):
        config = LlamaConfig(**options, rope_parameters={"rope_theta": 1e4, **rope})
        assert not can_share(LlamaForCausalLM(config))
    assert can_share(LlamaForCausalLM(LlamaConfig(**options)))


@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_whole_batch_where_only_one_thread_works(tmp_path, two_threads, dtype, shared):
    """And hooks of transformers, which keep nothing, do not stand in the way."""
    model, rows = tiny.gpt2().to(dtype), set()
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    inner = model.transformer.wte.forward

    def forward(ids):
        rows.add((len(ids), threading.current_thread().name == "MainThread"))
        return inner(ids)

    model.transformer.wte.forward = forward
    items = [[1, 2, 3, 4, 5]] * 24
    build(tmp_path / "two", model, items=items, batch_size=8)
    assert rows == {(shared, True), (shared, False)}
    rows.clear()
    torch.set_num_threads(1)
    build(tmp_path / "one", model, items=items, batch_size=8)
    assert rows == {(8, True)}


@pytest.mark.parametrize("why", ["a hook", "accelerate", "autocast", "one thread", "compiled"])
def test_one_thread_where_two_might_disturb_each_other(tmp_path, two_threads, why):
    names = set()
    model = passing(tiny.gpt2(), names)
    if why == "a hook":
        model.transformer.wte.register_forward_hook(lambda module, args, output: None)
    elif why == "accelerate":
        model.transformer.wte._hf_hook = None
    elif why == "one thread":
        torch.set_num_threads(1)
    elif why == "compiled":
        model._compiled_call_impl = model._call_impl  # as model.compile() leaves it
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        build(tmp_path / "store", model)
    assert names == {threading.current_thread().name}
