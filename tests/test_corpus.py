"""Corpus forms, and text tokenised in pieces against the tokenizer on the whole text."""

import io

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from knnlm_hf import texts
from knnlm_hf.corpus import documents
from knnlm_hf.errors import CorpusError
from knnlm_hf.texts import TextTokenizer


def prose(seed, characters):
    """Words, punctuation, runs of spaces and newlines, and characters of many bytes."""
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "cat",
        "Sat",
        "on",
        "naïve",
        "mats",
        "日本語",
        "🙂🙂",
        "x" * 9,
        "1,234.5",
        "don't",
    ]
    gaps = [" ", " ", " ", " ", "\n", "  ", ", ", ".\n\n", "\t", "     ", " — "]
    parts = []
    while sum(map(len, parts)) < characters:
        parts += [words[rng.integers(len(words))], gaps[rng.integers(len(gaps))]]
    return "".join(parts)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([prose(1, 4000)], trainer)
    return backend


def metaspace_bpe(split):
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    backend.train_from_iterator([prose(1, 4000)], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    backend.train_from_iterator([prose(1, 4000)], trainer)
    return backend


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    backend.train_from_iterator([prose(1, 4000)], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


BACKENDS = {
    "byte level": byte_level,
    "metaspace": lambda: metaspace_bpe(True),
    "metaspace unsplit": lambda: metaspace_bpe(False),
    "unigram": unigram,
    "word piece": word_piece,
}


def joined(pieces):
    rows = list(pieces)
    tokens = [int(token) for piece, _ in rows for token in piece]
    return tokens, sum(words for _, words in rows), len(rows)


@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_join_to_the_tokens_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(texts, "_SLICE", 700)
    monkeypatch.setattr(texts, "_OVERLAP", 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[name]())
    # Runs longer than the overlap, where neighbours cannot agree; special tokens in the text.
    hard = prose(5, 900) + " " * 1500 + "=" * 1111 + "<s>the[SEP]" + prose(6, 900) + "\n" * 800
    for text in (prose(2, 9000), hard, "", "   ", "one", " lead", prose(3, 701)[:701]):
        tokens, words, pieces = joined(TextTokenizer(tokenizer).pieces(text))
        assert tokens == tokenizer(text).input_ids
        assert words == len(text.split())
        if len(text) >= 9000:
            assert pieces > 10  # it really was cut


def test_a_tokenizer_without_offsets_takes_the_text_whole():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": [len(word) for word in text.split()]}

    assert joined(TextTokenizer(Slow()).pieces(io.StringIO("a bb ccc")))[0] == [1, 2, 3]


def test_truncation_and_padding_of_the_tokenizer_do_not_count():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    found = [doc.tokens.tolist() for doc in documents(["w2 w3 w4", "w5 w6"], tokenizer)]
    assert found == [[2, 3, 4], [5, 6]]
    assert tokenizer.backend_tokenizer.truncation is not None  # the user's stays as it was


ITEMS = [[1, 2, 3], [], [4], [5, 6]]
TEXTS = ["<unk> w2 w3", "", "w4", "w5 w6"]


def token_forms():
    columns = {"input_ids": ITEMS, "text": TEXTS}
    yield ITEMS
    yield tuple(ITEMS)
    yield (item for item in ITEMS)
    yield [torch.tensor(item) for item in ITEMS]
    yield [np.array(item, dtype=np.uint16) for item in ITEMS]
    yield [{"input_ids": item} for item in ITEMS]
    yield columns
    yield Dataset.from_dict(columns)
    yield Dataset.from_dict(columns).with_format("torch")
    yield Dataset.from_dict(columns).to_iterable_dataset()
    yield IterableDataset.from_generator(lambda: ({"input_ids": item} for item in ITEMS))


def text_forms():
    yield TEXTS
    yield (text for text in TEXTS)
    yield [{"text": text, "id": 3} for text in TEXTS]
    yield {"text": TEXTS}
    yield Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3, 4]})
    yield IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))


def test_every_form_gives_the_same_documents():
    for corpus in token_forms():
        stream = documents(corpus, vocab_size=7)
        found = list(stream)
        assert [doc.tokens.tolist() for doc in found] == ITEMS
        assert [doc.number for doc in found] == [0, 1, 2, 3]
        assert stream.words is None
        assert all(doc.tokens.dtype == np.int32 for doc in found)
    for corpus in text_forms():
        stream = documents(corpus, tiny.tokenizer())
        assert [doc.tokens.tolist() for doc in stream] == ITEMS
        assert stream.words == 6


def test_long_texts_between_short_ones_keep_their_numbers():
    long = "w7 " * 60_000
    found = {}
    for doc in documents(["w2 w3", long, "w4 w5"], tiny.tokenizer()):
        found.setdefault(doc.number, []).extend(doc.tokens.tolist())
    assert found == {0: [2, 3], 1: [7] * 60_000, 2: [4, 5]}


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"w2 w3\r\nw4\n")
    for corpus in (str(path), path):
        stream = documents(corpus, tiny.tokenizer())
        pieces = list(stream)
        assert [token for piece in pieces for token in piece.tokens] == [2, 3, 4]
        assert {piece.number for piece in pieces} == {0}
        assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        assert stream.words == 3


def test_bos_goes_before_each_document_that_lacks_it(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<eos>"
    found = [d.tokens.tolist() for d in documents([[5], [0, 6], []], tokenizer, bos=True)]
    assert found == [[0, 5], [0, 6], [0]]
    path = tmp_path / "corpus.txt"
    path.write_text("w2 w3")
    pieces = list(documents(path, tokenizer, bos=True))
    assert [token for piece in pieces for token in piece.tokens] == [0, 2, 3]
    from_config = documents([[5]], bos=True, config=tiny.gpt2().config)
    assert [d.tokens.tolist() for d in from_config] == [[0, 5]]
    with pytest.raises(CorpusError, match="BOS"):
        documents([[5]], bos=True)


BAD = {
    "no such file": "no/such/file.txt",
    "is a folder": ".",
    "it has no documents": [],
    "no document of the corpus has 2 tokens": [[1], []],
    "document 1 has token id 61": [[1, 2], [1, 61]],
    "token id -1": [[1, -1]],
    "beyond 32 bits": [[1, 2**40]],
    "pass the tokenizer": ["w2 w3"],
    "put the ids of one document in a list": [1, 2, 3],
    "type float64": [[1.5, 2.5]],
    "2 dimension": [[[1, 2], [3, 4]]],
    "is bytes": b"abc",
    "of type int": 5,
    "no column": {"content": ["a"]},
    "choose one of 'train'": DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_corpus(message):
    with pytest.raises(CorpusError, match=message) as caught:
        list(documents(BAD[message], vocab_size=61))
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="empty"):
        list(documents(tmp_path / "empty", tiny.tokenizer()))
    with pytest.raises(CorpusError, match="UTF-8"):
        list(documents(tmp_path / "latin", tiny.tokenizer()))
