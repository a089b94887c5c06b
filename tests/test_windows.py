"""Windows against a brute force that knows only the definition."""

import numpy as np
import pytest
import torch
from transformers import BloomConfig, GPT2Config, MambaConfig, RobertaConfig

from knnlm_hf.errors import SettingError
from knnlm_hf.windows import Document, batches, check_window, default_window, stream, windows


def test_by_hand():
    # 7 tokens, windows of 3 inputs, 2 new each: a b c -> b c d | c d e -> . e f | e f -> . g
    found = list(windows([10, 11, 12, 13, 14, 15, 16], 4, 3, 2))
    assert [w.tokens.tolist() for w in found] == [[10, 11, 12], [12, 13, 14], [14, 15]]
    assert [w.targets.tolist() for w in found] == [[11, 12, 13], [13, 14, 15], [15, 16]]
    assert [w.new for w in found] == [3, 2, 1]
    assert [(w.document, w.start) for w in found] == [(4, 0), (4, 2), (4, 4)]


def brute_force(n, window, stride):
    """{target position: start of the first window that predicts it}, by trying every window."""
    first = {}
    for start in range(0, n, stride):
        for target in range(start + 1, min(start + window, n - 1) + 1):
            first.setdefault(target, start)
    return first


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_every_token_but_the_first_exactly_once_with_the_promised_context(window):
    for stride in range(1, window + 1):
        for n in range(0, 40):
            tokens = np.arange(100, 100 + n)
            found = {}
            for w in windows(tokens, 0, window, stride):
                assert len(w.tokens) == len(w.targets) <= window
                assert w.start % stride == 0
                assert w.tokens.tolist() == tokens[w.start : w.start + len(w.tokens)].tolist()
                assert (w.targets == w.tokens + 1).all()
                assert 1 <= w.new <= len(w.tokens)
                for target in (w.targets[-w.new :] - 100).tolist():
                    assert target not in found
                    found[target] = w.start
                    context = target - w.start  # inputs up to the prediction
                    assert context >= min(target, window - stride + 1)
            assert found == brute_force(n, window, stride)


def test_a_document_in_pieces_gives_the_windows_of_the_whole():
    rng = np.random.default_rng(0)
    lengths = [0, 5, 1, 43, 2, 64]
    whole = [Document(i, rng.integers(9, size=n).astype(np.int32)) for i, n in enumerate(lengths)]
    pieces = []
    for doc in whole:
        at = sorted(rng.integers(len(doc.tokens) + 1, size=5).tolist())
        parts = np.split(doc.tokens, at)
        pieces += [Document(doc.number, part, more=True) for part in parts[:-1]]
        pieces.append(Document(doc.number, parts[-1]))

    def facts(documents):
        rows = stream(documents, 8, 3)
        return [(w.document, w.start, w.tokens.tolist(), w.targets.tolist(), w.new) for w in rows]

    assert facts(pieces) == facts(whole)
    assert sum(row[4] for row in facts(whole)) == sum(max(0, n - 1) for n in lengths)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_read_row_by_row_are_the_corpus(batch_size):
    items = [[], [3], list(range(1, 23)), [5, 6], [7, 8, 9], list(range(30, 41))]
    documents = [Document(i, np.array(item, dtype=np.int32)) for i, item in enumerate(items)]
    found = list(batches(documents, 6, 4, batch_size))
    assert all(len(batch.input_ids) == batch_size for batch in found[:-1])
    new = torch.cat([batch.targets[batch.is_new] for batch in found]).tolist()
    assert new == [token for item in items for token in item[1:]]
    assert sum(batch.new for batch in found) == len(new)
    for batch in found:
        mask = batch.attention_mask
        for b, (document, start) in enumerate(zip(batch.documents, batch.starts, strict=True)):
            length = int(batch.lengths[b])
            item = items[int(document)]
            assert batch.input_ids[b, :length].tolist() == item[start : int(start) + length]
            assert not batch.is_new[b, length:].any()
            if mask is None:
                assert length == batch.input_ids.shape[1]
            else:
                assert mask[b].tolist() == [1] * length + [0] * (len(mask[b]) - length)


def test_window_defaults_and_limits():
    assert default_window(GPT2Config(n_positions=77)) == 77
    assert default_window(MambaConfig()) == 1024
    assert default_window(BloomConfig()) == 1024
    assert default_window(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    config = GPT2Config(n_positions=77)
    assert check_window(None, None, config) == (77, 38)
    assert check_window(1, None, config) == (1, 1)
    assert check_window(4096, 4, MambaConfig()) == (4096, 4)


@pytest.mark.parametrize(
    ("window", "stride"),
    [(0, None), (-1, 1), (78, 1), (8, 9), (8, 0), (2.5, 1), (8, 1.5), (True, 1)],
)
def test_bad_windows(window, stride):
    with pytest.raises(SettingError, match=r"window|stride"):
        check_window(window, stride, GPT2Config(n_positions=77))
