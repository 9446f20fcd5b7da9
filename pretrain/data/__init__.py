"""Training data: from packed rows on disk to batches, ordered by the global sample number alone.

`TokenDataset` opens a folder of shards. `DataPlan` says which row of which source a global sample
number is (`blend` mixes sources, `order` shuffles each). `TrainLoader` and `ValidLoader` make the
batches of one data-parallel rank.
"""

from pretrain.data.batch import Batch, DataCursor
from pretrain.data.blend import Phase
from pretrain.data.dataset import DataError, TokenDataset
from pretrain.data.loader import TrainLoader, ValidLoader
from pretrain.data.plan import DataPlan, open_plan, open_valid
from pretrain.data.quarantine import DamagedRow, Quarantine
from xlstm_io.shards.index import CorruptShardError

__all__ = [
    "Batch",
    "CorruptShardError",
    "DamagedRow",
    "DataCursor",
    "DataError",
    "DataPlan",
    "Phase",
    "Quarantine",
    "TokenDataset",
    "TrainLoader",
    "ValidLoader",
    "open_plan",
    "open_valid",
]
