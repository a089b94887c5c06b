"""Folders whose files are replaced all at once: killed at any moment, they are as before or after.

What is to lie in a folder is written elsewhere, and synchronised. Where there is no folder yet,
that gets its name, in one rename. Else it moves into the folder, whole and in one rename, as
`.knnlm_hf-new`; from there its files take their places one by one, and whoever opens or fills the
folder next goes on with that where it stopped. What else lies in the folder stays as it is.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knnlm_hf.errors import PersistenceError, refusal

OURS = ".knnlm_hf-*"
"""Names of what is not in its place yet; of no use to others."""
_NEW = ".knnlm_hf-new"
_UNFINISHED = ".knnlm_hf-unfinished-"


@contextmanager
def filled_at_once(target: Path) -> Iterator[Path]:
    """Give a temporary folder; what is in it when the block ends well lies in `target` then.

    Files of the same names are replaced, others stay. On an error `target` is as it was, and
    nothing half-written is left; killed at any moment, it is for `finish` as before or as after.

    Raises:
        PersistenceError: the disk is full, read-only, or something is in the way.
    """
    if target.exists() and not target.is_dir():
        raise PersistenceError(f"{target}: a file is in the way, expected a folder")
    missing = [parent for parent in (target, *target.parents) if not parent.exists()]
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Within it where it is there: it may be a volume of its own, where nothing can be renamed
        # to from outside.
        home = target if target.is_dir() else target.parent
        folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=home))
        yield folder
        _settle(folder)
        _put(folder, target)
        finish(target)
    except OSError as error:
        raise PersistenceError(f"{target}: cannot be written: {refusal(error)}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                with suppress(OSError):
                    parent.rmdir()


def finish(folder: Path) -> bool:
    """Go on where a process was killed that replaced the files of `folder`; else do nothing.

    No link is followed, so that nothing outside the folder is changed, whoever wrote it.

    Returns:
        whether there was something to do.

    Raises:
        PersistenceError: the folder cannot be written.
    """
    new = folder / _NEW
    if not _is_folder(new):
        return False
    try:
        _move(new, folder)
    except OSError as error:
        raise PersistenceError(
            f"{folder}: saving into it was interrupted, and it cannot be written to go on: "
            f"{refusal(error)}; what was saved lies in {_NEW} there: mend that, and do it again"
        ) from error
    return True


def follow_umask(path: Path) -> None:
    """Give a file or folder the mode of any new one: temporary ones may be their owner's alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync_folder(folder: Path) -> None:
    """Return when the folder's names are on the disk; not every system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _settle(folder: Path) -> None:
    """Bring a folder to the disk, with the modes of new files."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            follow_umask(path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    follow_umask(folder)
    sync_folder(folder)


def _put(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`, or move it in there where that exists: in one rename."""
    while True:
        finish(target)
        is_there = target.is_dir()
        if is_there:
            _check_way(folder, target)
        try:
            os.replace(folder, target / _NEW if is_there else target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another process has just put its own there
    with suppress(OSError):  # it is done: an error would say that it is not
        sync_folder(target if is_there else target.parent)


def _check_way(source: Path, place: Path) -> None:
    """Raise `PersistenceError` where a folder would have to replace something else, or be."""
    for child in source.iterdir():
        there = place / child.name
        if not os.path.lexists(there):
            continue
        if _is_folder(child) != _is_folder(there):
            found, wanted = "a folder is", "a file"
            if _is_folder(child):
                found, wanted = f"a {'link' if there.is_symlink() else 'file'} is", "a folder"
            raise PersistenceError(f"{there}: {found} in the way, expected {wanted}")
        if _is_folder(child):
            _check_way(child, there)


def _move(source: Path, place: Path) -> None:
    """Let `source` take a place; a folder's contents join those of the folder that is there."""
    if _is_folder(source) and _is_folder(place):
        for child in sorted(source.iterdir()):
            _move(child, place / child.name)
        with suppress(OSError):  # another process was first, or has more to put
            source.rmdir()
    else:
        with suppress(FileNotFoundError):  # another process was first
            os.replace(source, place)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
