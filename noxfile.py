"""The versions that pyproject.toml declares, from both ends: `nox -s oldest`, `nox -s newest`.

    nox -s oldest -- tests/test_wrapper.py    # any arguments of pytest

`oldest` installs constraints-oldest.txt. PyPI's old builds of torch for Linux bring some gigabytes
of CUDA libraries, which the tests do not use. `newest` takes whatever is newest today; where
torch's build for the CPU is wanted, name it: `TORCH="torch==2.13.0" nox -s newest`.
"""

import os

import nox

nox.options.sessions = ["oldest", "newest"]
CORE = [
    f"tests/test_{name}.py"
    for name in (
        "interpolation", "windows", "capture", "datastore", "build", "index_exact", "index_faiss",
        "memory", "multi_embedding", "wrapper", "generate", "generating", "saving", "scoring",
        "tuning", "ecosystem", "skipping",
    )
]  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_tests(session: nox.Session) -> None:
    """Say what is installed, and test it."""
    session.run("python", "-c", "import torch, transformers, faiss; "
                "print('torch', torch.__version__, 'transformers', transformers.__version__, "
                "'faiss', faiss.__version__)")  # fmt: skip
    session.run("python", "-m", "pytest", "-q", *(session.posargs or [*CORE, "-n", "2"]),
                env=ENVIRONMENT)  # fmt: skip


@nox.session
def oldest(session: nox.Session) -> None:
    """The core tests on the oldest versions declared."""
    session.install("-q", "-r", "constraints-oldest.txt")
    session.install("-q", "--no-deps", "-e", ".")
    run_tests(session)


@nox.session
def newest(session: nox.Session) -> None:
    """All tests on the newest versions allowed."""
    if torch := os.environ.get("TORCH"):
        session.install("-q", torch)
    session.install("-q", "--upgrade", "-e", ".[cpu,study,test]")
    if not session.posargs:
        session.posargs.extend(["-n", "2"])
    run_tests(session)
