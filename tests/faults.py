"""Faults on the file layer: every write, fsync, rename, deletion and new folder may fail.

`PLACES` is the one list of what is patched. A dry run counts the operations of a piece of work;
then it is run once for each of them, failing there.
"""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

from knnlm_hf.datastore import atomic
from knnlm_hf.index import faiss_files
from knnlm_hf.memory import head_files

PLACES = [  # owner, name, whether it fills the disk, which argument is the file written
    (atomic, "write_all", True, None),
    (faiss_files, "write", True, 1),
    (atomic, "save_file", True, 1),
    (head_files, "save_file", True, 1),
    (Path, "write_text", True, 0),
    (os, "mkdir", True, None),
    (os, "fsync", True, None),
    (os, "replace", False, None),
    (os, "unlink", False, None),
    (os, "rmdir", False, None),
]


class Killed(BaseException):
    """As from SIGKILL: nothing handles it, and nothing is written or deleted after it."""


class Faults:
    """Counts the operations of the block, and makes one of them, and what follows, fail.

    Args:
        kind: `none`; `kill`: half of a write is done, and nothing after it; `full`: no space from
            then on; `readonly`: from then on nothing can be changed.
        at: number of the operation that fails, from 1.
        between: called before every operation, with faults out of the way.
    """

    def __init__(self, kind="none", at=0, between=None):
        self.kind, self.at, self.between = kind, at, between
        self.count, self._resting = 0, False

    @contextmanager
    def armed(self):
        kept = [(owner, name, getattr(owner, name)) for owner, name, *_ in PLACES]
        for (owner, name, fills, file), (*_, real) in zip(PLACES, kept, strict=True):
            setattr(owner, name, self._wrapped(real, name, fills, file))
        try:
            yield self
        finally:
            for owner, name, real in kept:
                setattr(owner, name, real)

    def _wrapped(self, real, name, fills, file):
        def operation(*args, **options):
            place = str(args[0]) if args else ""
            if self._resting or place.endswith(".lock") or place.startswith("/proc"):
                return real(*args, **options)
            self.count += 1
            if self.between is not None:
                with self.resting():
                    self.between()
            if self.kind == "none" or self.count < self.at:
                return self._undisturbed(real, args, options)
            if self.kind == "kill":
                if self.count == self.at and fills:
                    self._halved(real, name, file, args, options)
                raise Killed
            if self.kind == "readonly":
                raise OSError(errno.EROFS, "Read-only file system")
            if fills:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._undisturbed(real, args, options)

        return operation

    @contextmanager
    def resting(self):
        """No faults and no counting inside."""
        was, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = was

    def _undisturbed(self, real, args, options):
        """One operation, whatever others it is made of."""
        with self.resting():
            return real(*args, **options)

    def _halved(self, real, name, file, args, options):
        if name == "write_all":
            data = memoryview(args[1]).cast("B") if len(args[1]) else b""
            args[0].write(data[: len(data) // 2])
        elif file is not None:
            self._undisturbed(real, args, options)
            with open(args[file], "r+b") as written:
                written.truncate(os.path.getsize(args[file]) // 2)


def operations(work):
    """How many operations `work` consists of."""
    faults = Faults()
    with faults.armed():
        work()
    return faults.count


def damaged(data):
    """What may have become of a file's bytes: flips at either end and between, cuts, growth."""
    size = len(data)
    for at in sorted({0, 1, size // 3, size // 2, size - 2, size - 1} & set(range(size))):
        yield f"byte {at} flipped", data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
    for kept in (0, size // 2, size - 1):
        yield f"cut to {kept}", data[:kept]
    yield "grown", data + b"\0"
