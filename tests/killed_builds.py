"""Run by test_build_faults.py: builds killed at every write, fsync and rename, then resumed.

Prints one JSON object. It forks, so it must be a process of its own with a single thread.
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch

from knnlm_hf import Datastore
from knnlm_hf.datastore import atomic
from knnlm_hf.errors import DatastoreError

ITEMS = [*tiny.corpus(documents=3, seed=8, longest=60), []]
MODEL, TOKENIZER = tiny.gpt2(), tiny.tokenizer()


def build(path):
    return Datastore.build(
        MODEL, ITEMS, path, tokenizer=TOKENIZER, window=16, stride=8, batch_size=2, shard_size=30,
        progress=False,
    )  # fmt: skip


def contents(path):
    files = (file for file in Path(path).rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def arm(count):
    """Make the count-th write, fsync or rename kill this process; a write is cut in half."""
    left = count

    def deadly(function, before):
        def wrapper(*args):
            nonlocal left
            left -= 1
            if left == 0:
                before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return wrapper

    def half(file, data):
        data = memoryview(data).cast("B") if len(data) else b""
        file.write(data[: len(data) // 2])

    atomic.write_all = deadly(atomic.write_all, half)
    os.fsync = deadly(os.fsync, lambda *args: None)
    os.replace = deadly(os.replace, lambda *args: None)


def in_child(function):
    """Run `function` in a fork; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed(folder, expected):
    """Kill at every event in turn; returns how many there were and what went wrong."""
    wrong = []
    for count in range(1, 1000):
        path = folder / str(count)
        status = in_child(lambda n=count, p=path: (arm(n), build(p)))
        if os.WIFEXITED(status):
            return count - 1, wrong + ([] if os.WEXITSTATUS(status) == 0 else ["failed"])
        try:
            Datastore.open(path)
            # Only what follows the last rename can be lost without loss.
            if contents(path) != expected:
                wrong.append(f"{count}: opened though unfinished")
        except (DatastoreError, OSError):
            pass
        except Exception as error:
            if type(error).__name__ != "PersistenceError":
                wrong.append(f"{count}: {error}")
        build(path).verify()
        if contents(path) != expected:
            wrong.append(f"{count}: other bytes")
        shutil.rmtree(path)
    return 1000, ["never finished"]


def full_disk(path, expected):
    """A file may not grow beyond some size: one clear line, nothing unfinished, resumable."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            build(path)
        except DatastoreError as error:
            os._exit(3 if "cannot write" in str(error) and "\n" not in str(error) else 4)

    status = os.WEXITSTATUS(in_child(limited))
    left = [name for name in contents(path) if ".tmp" in name] if path.exists() else []
    build(path)
    return {"status": status, "left": left, "same": contents(path) == expected}


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    build(folder / "whole")
    expected = contents(folder / "whole")
    events, wrong = killed(folder, expected)
    print(
        json.dumps(
            {
                "shards": sum(name.startswith("shard-") for name in expected),
                "events": events,
                "wrong": wrong,
                "full": full_disk(folder / "full", expected),
            }
        )
    )


if __name__ == "__main__":
    main()
