"""Training data: packed rows on disk -> batches, ordered by the global sample number alone.

``TokenDataset`` opens a folder of shards, ``order`` says which row a global sample number is,
``TrainLoader`` and ``ValidLoader`` make the batches of one data-parallel rank.
"""

from data_prep.shards import CorruptShardError
from pretrain.data.batch import Batch, DataCursor
from pretrain.data.dataset import DataError, TokenDataset
from pretrain.data.loader import TrainLoader, ValidLoader

__all__ = [
    "Batch",
    "CorruptShardError",
    "DataCursor",
    "DataError",
    "TokenDataset",
    "TrainLoader",
    "ValidLoader",
]
