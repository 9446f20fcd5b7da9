"""The samples that a folder of shards holds."""

from itertools import pairwise

import numpy as np

from xlstm_io.shards.manifest import load_manifest
from xlstm_io.shards.rows import PADDING, POSITION_MASK, no_label
from xlstm_io.shards.shard import ShardReader
from xlstm_io.tokenizer import open_tokenizer


def samples_of(folder, split):
    """Symbols and labels by position of every sample in the shards."""
    manifest = load_manifest(folder)
    names = open_tokenizer(manifest.tokenizer_path)
    found = []
    for entry in manifest.shards(split):
        reader = ShardReader(manifest, entry)
        none = no_label(reader.dtype)
        for number in range(entry.rows):
            tokens = np.empty(manifest.row_tokens, reader.dtype)
            labels = np.empty(manifest.seq_len, reader.dtype)
            segments = reader.row(number, tokens, labels)
            starts = (segments & POSITION_MASK).tolist()
            assert segments[-1] & PADDING and not (segments[:-1] & PADDING).any()
            for start, end in pairwise(starts):
                own = labels[start:end]
                given = {n: names.token(int(x)) for n, x in enumerate(own) if x != none}
                found.append((names.decode(tokens[start:end]).split(), given))
        reader.close()
    return found
