"""Corpus → datastore: `Datastore`, the reader that can also build, change, sample and index."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from knnlm_hf import identity
from knnlm_hf.capture import find
from knnlm_hf.corpus import documents
from knnlm_hf.datastore import DTYPES, DatastoreReader, Manifest, appending, atomic, removal
from knnlm_hf.datastore.builder import build_in
from knnlm_hf.datastore.folder import locked
from knnlm_hf.datastore.manifest import load
from knnlm_hf.datastore.sampling import compact, subsample
from knnlm_hf.errors import DatastoreError, SettingError
from knnlm_hf.index import SearchIndex, build_index, take_in
from knnlm_hf.loading import loaded
from knnlm_hf.types import check_count
from knnlm_hf.windows import check_window

_log = logging.getLogger(__name__)


class Datastore(DatastoreReader):
    """(hidden state, next token) for every token of a corpus; see `build` and `open`."""

    @classmethod
    def build(
        cls,
        model: nn.Module | str | Path,
        corpus: Any,
        path: str | Path,
        *,
        tokenizer: Any = None,
        layer: str = "att",
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        dtype: str = "float16",
        shard_size: int = 1 << 20,
        resume: bool = True,
        progress: bool = True,
        bos: bool | None = None,
    ) -> Self:
        """Run the model over a corpus and keep the state before each token with the token.

        A document of n tokens gives n − 1 entries. A killed build resumes when it is run again with
        the same arguments, and ends with the same bytes as one that was not killed.

        Args:
            model: a causal language model (of a kNN model, its base), or a path or Hub id of one.
            corpus: see `corpus.documents`.
            path: folder of the store.
            tokenizer: needed where the corpus is text; a copy is kept with the store.
            layer: `att`, `ffn`, `final` or a module path, see `capture.find`.
            window: input tokens per window; None: the model's longest context.
            stride: new tokens per window, 1 ≤ stride ≤ window; None: half the window.
            batch_size: windows at a time; where a CPU has two cores, two forwards go side by side.
            dtype: of the keys: float32, float16 or bfloat16.
            shard_size: entries per file. A multiple of 2²⁰ fills whole huge pages of memory,
                however wide the layer is: then the keys of all files lie in such as one array.
            resume: continue an unfinished store, and return a finished one of the same settings and
                corpus; False: an existing store is an error.
            progress: show a progress bar on stderr.
            bos: True puts the beginning-of-sequence token before each document, so that its first
                token gives an entry too; otherwise as the tokenizer has it.

        Raises:
            SettingError, CorpusError, CaptureError: an argument that cannot be used.
            DatastoreError: the folder holds something else, another process is building there, the
                disk is full or read-only, or a state is NaN, infinite or too large for `dtype`.
            ModelMismatchError: an unfinished store there was begun with another model.
        """
        base, tokenizer = loaded(model, tokenizer)
        config = base.config.get_text_config(decoder=True)
        window, stride = check_window(window, stride, config)
        check_count("batch_size", batch_size)
        check_count("shard_size", shard_size)
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise SettingError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        find(base, layer)  # before anything is written
        texts = documents(corpus, tokenizer, vocab_size=config.vocab_size, bos=bos, config=config)
        wanted = Manifest(
            layer=layer,
            dim=0,  # known after the first forward pass
            dtype=dtype,
            vocab_size=config.vocab_size,
            window=window,
            stride=stride,
            batch_size=batch_size,
            shard_size=shard_size,
            bos=bool(bos),
            model=identity.describe(base, tokenizer),
        )
        folder = Path(path).expanduser()
        build_in(folder, wanted, base, tokenizer, texts, resume, progress)
        return cls.open(folder)

    def append(
        self,
        model: nn.Module | str | Path,
        corpus: Any,
        *,
        tokenizer: Any = None,
        resume: bool = True,
        progress: bool = True,
    ) -> Self:
        """Go on with new documents: same model, layer, dtype and windows as the store's.

        Entry and document numbers go on where the store ends. What others have open they keep
        seeing as it was, and so does this object: the grown store is returned. A killed append
        resumes when it is run again with the same corpus. Built indexes take in the new entries
        without training anew; one that was trained on less than half of what there is now, or that
        would find less, is left as it is, stale, with a line saying how to rebuild it.

        Args:
            model: the store's model, or its path or Hub id.
            corpus: see `corpus.documents`.
            tokenizer: needed where the corpus is text; default: the one kept with the store.
            resume: continue an interrupted append, and take a corpus that is just what was appended
                last for the same append, done already; False: drop what is unfinished, and append.
            progress: show a progress bar on stderr.

        Raises:
            ModelMismatchError: another model or tokenizer than the store's.
            CorpusError: a corpus that cannot be read.
            DatastoreError: a subsample, another writer at work, a disk that is full or read-only,
                or an interrupted append of another corpus.
        """
        base, tokenizer = loaded(model, tokenizer)
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        config = base.config.get_text_config(decoder=True)
        with locked(self.path):
            store = type(self).open(self.path)
            store.check_model(base, tokenizer)
            if store.manifest.subsample is not None:
                raise DatastoreError(
                    f"{self.path}: a subsample: append to the store it is drawn of"
                )
            staging = self.path / appending.STAGING
            wanted = appending.settings(store.manifest)
            wanted = replace(wanted, model=identity.describe(base, tokenizer))
            check_window(wanted.window, wanted.stride, config)
            texts = documents(
                corpus, tokenizer, vocab_size=config.vocab_size, bos=wanted.bos, config=config
            )
            if not resume:
                atomic.remove(staging)
            is_resumed = staging.exists()
            try:
                build_in(staging, wanted, base, tokenizer, texts, True, progress)
            except DatastoreError as error:
                hint = "; an append was interrupted here: resume=False drops it"
                raise type(error)(f"{error}{hint if is_resumed else ''}") from error
            staged = DatastoreReader.open(staging)
            if not resume or store.manifest.appended[-1:] != (appending.note(staged),):
                take_in(store, staged, progress)
            with atomic.explaining(self.path):
                appending.clear(self.path, load(self.path))
        return type(self).open(self.path)

    def remove(self, documents: Any) -> None:
        """Take documents out, by number: from now on no search, sample or training sees them.

        This object and memories over it honour it at once, others when they open the store again.
        Numbers of entries and documents stay as they are. The rows stay on the disk until `compact`
        writes a store without them.

        Args:
            documents: numbers of documents, as `document` gives them; removed ones may be among
                them.

        Raises:
            SettingError: a number that is no document's.
            DatastoreError: another writer at work, a disk that is full or read-only, or the folder
                holds another store by now.
        """
        numbers = removal.checked(documents, self.documents)
        with locked(self.path), atomic.explaining(self.path):
            there = load(self.path)
            if not there.complete or not there.goes_on(self.manifest):
                raise DatastoreError(
                    f"{self.path}: holds another store by now than the one opened: open it again"
                )
            numbers = sorted({*removal.load(self.path, there), *numbers})
            changed = removal.write(self.path, there, numbers)
        if changed.shards == self.manifest.shards:
            self.manifest = changed
        self._take_away([number for number in numbers if number < self.documents])
        if 2 * self.live < len(self):
            _log.warning(
                "%s: only %d of %d entries are left, which makes searching slow: write a store "
                "without the others with store.compact(path)",
                self.path, self.live, len(self),
            )  # fmt: skip

    def compact(self, path: str | Path, *, progress: bool = True) -> Self:
        """Write a store without the removed documents' rows to a new folder; verify and open it.

        Documents keep their numbers, entries do not. Indexes are to be built anew.

        Raises:
            DatastoreError: `path` exists, cannot be written, or nothing would be left.
        """
        compact(self, Path(path).expanduser())
        store = type(self).open(path)
        store.verify(progress=progress)
        return store

    def subsample(self, fraction: float, path: str | Path, seed: int = 0) -> Self:
        """Write a uniform sample of the live entries, in order, as a new store, and open it.

        It has round(fraction · live) entries, at least one; equal seeds give equal bytes.
        `document` still tells the item of the original corpus; `context` is refused, as the
        neighbouring entries are missing.

        Raises:
            SettingError: not 0 < fraction ≤ 1.
            DatastoreError: `path` exists, or cannot be written; or every entry is removed.
        """
        subsample(self, fraction, Path(path).expanduser(), seed)
        return type(self).open(path)

    def build_index(
        self,
        spec: str = "auto",
        *,
        metric: str = "l2",
        nprobe: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> SearchIndex:
        """Build an index over the keys and keep it in the store; see `index.build_index`."""
        with locked(self.path):
            return build_index(
                self.keys,
                self.values,
                self.path / "indexes",
                spec,
                metric=metric,
                digest=self.manifest.rows_digest,
                nprobe=nprobe,
                seed=seed,
                progress=progress,
                removed=self.removed,
            )
