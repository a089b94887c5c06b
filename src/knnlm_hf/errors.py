"""Every refusal of this library is a `KNNLMError`: what was found, expected, and what to do."""


class KNNLMError(Exception):
    """Base class of all errors raised on purpose by `knnlm_hf`."""


class SettingError(KNNLMError, ValueError):
    """A setting outside its range: λ, k, the temperature, a metric, a window."""


class CorpusError(KNNLMError, ValueError):
    """A corpus that is missing, empty, of the wrong form, or that does not fit the model."""


class CaptureError(KNNLMError):
    """A layer that the model does not have, or whose states cannot be used."""


class DatastoreError(KNNLMError):
    """A datastore that is missing, unfinished, damaged, locked, or made for something else."""


class ModelMismatchError(DatastoreError):
    """A memory that was made with another model than the one it is used with."""


class SearchIndexError(KNNLMError):
    """An index that is missing, stale, of another metric, or that cannot be built as asked."""


class PersistenceError(KNNLMError):
    """A folder or Hub repository that does not hold what was asked of it."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refusal(error: OSError) -> str:
    """Why the system refused: "No space left on device"."""
    return error.strerror or str(error) or type(error).__name__
