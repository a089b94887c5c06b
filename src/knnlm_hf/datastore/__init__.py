"""Datastores on disk: manifest, shard writer, memory-mapped reader."""

from knnlm_hf.datastore.manifest import DTYPES, Manifest
from knnlm_hf.datastore.reader import DatastoreReader
from knnlm_hf.datastore.rows import Rows
from knnlm_hf.datastore.writer import ShardText, StoreWriter

__all__ = ["DTYPES", "DatastoreReader", "Manifest", "Rows", "ShardText", "StoreWriter"]
