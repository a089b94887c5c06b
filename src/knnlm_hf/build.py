"""Corpus → datastore: `Datastore`, the reader that can also build, subsample and index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from torch import nn

from knnlm_hf import identity
from knnlm_hf.capture import find
from knnlm_hf.corpus import documents
from knnlm_hf.datastore import DTYPES, DatastoreReader, Manifest
from knnlm_hf.datastore.builder import StoreBuild, check_corpus
from knnlm_hf.datastore.folder import existing, locked
from knnlm_hf.datastore.sampling import subsample
from knnlm_hf.errors import PersistenceError, SettingError, first_line
from knnlm_hf.index import SearchIndex, build_index
from knnlm_hf.types import check_count
from knnlm_hf.windows import check_window


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
        shard_size: int = 1_000_000,
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
            batch_size: windows per forward pass.
            dtype: of the keys: float32, float16 or bfloat16.
            shard_size: entries per file.
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
        loaded, tokenizer = _load(model, tokenizer)
        config = loaded.config.get_text_config(decoder=True)
        window, stride = check_window(window, stride, config)
        check_count("batch_size", batch_size)
        check_count("shard_size", shard_size)
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise SettingError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        find(loaded, layer)  # before anything is written
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
            model=identity.describe(loaded, tokenizer),
        )
        folder = Path(path).expanduser()
        with locked(folder):
            manifest = existing(folder, wanted, resume, loaded, tokenizer)
            if manifest is not None and manifest.complete:
                check_corpus(folder, manifest, texts, progress)
            else:
                StoreBuild(loaded, tokenizer, texts, folder, manifest or wanted).run(progress)
        return cls.open(folder)

    def subsample(self, fraction: float, path: str | Path, seed: int = 0) -> Self:
        """Write a uniform sample of the entries, in order, as a new store, and open it.

        It has round(fraction · N) entries, at least one; equal seeds give equal bytes. `document`
        still tells the item of the original corpus; `context` is refused, as the neighbouring
        entries are missing.

        Raises:
            SettingError: not 0 < fraction ≤ 1.
            DatastoreError: `path` exists, or cannot be written.
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
        return build_index(
            self.keys,
            self.values,
            self.path / "indexes",
            spec,
            metric=metric,
            digest=self.digest,
            nprobe=nprobe,
            seed=seed,
            progress=progress,
        )


def _load(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and tokenizer, loaded where they are given by path or Hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(model) if isinstance(model, str | Path) else None
    if source is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise PersistenceError(
                f"{source}: no causal language model: {first_line(error)}"
            ) from error
    if isinstance(tokenizer, str | Path):
        try:
            return model, AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError) as error:
            raise PersistenceError(f"{tokenizer}: no tokenizer: {first_line(error)}") from error
    if source is not None and tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):  # a corpus of token ids needs none
            tokenizer = None
    return model, tokenizer
