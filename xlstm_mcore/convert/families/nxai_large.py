"""State dicts of pip `xlstm`'s xLSTMLarge, the class that xLSTM 7B was published with.

Its names are those of transformers' `xlstm` but for the embedding. It has no configuration beside
it: sizes are read from the weights, and the rest are the class's defaults.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xlstm_mcore.convert.families import native_xlstm
from xlstm_mcore.convert.imports.config import ForeignConfig, shape_of
from xlstm_mcore.convert.tables import Shape, Table

NAME = "xLSTMLarge"
EMBEDDING = "embedding.weight"


def table(shapes: Mapping[str, Shape]) -> Table:
    """The table of single or of fused weights."""
    return replace(native_xlstm.table(shapes), embedding=EMBEDDING)


def model_section(config: ForeignConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `model:` section; see `native_xlstm.model_section`."""
    vocab, hidden = shape_of(shapes, EMBEDDING, 2)
    prefix = native_xlstm.TABLE.prefix.format(n=0)
    single = f"{prefix}mlstm_layer.igate_preact.bias"
    fused = f"{prefix}mlstm_layer.ifgate_preact.bias"
    if fused in shapes:
        heads = shape_of(shapes, fused, 1)[0] // 2
    else:
        heads = shape_of(shapes, single, 1)[0]
    found = ForeignConfig(
        {"hidden_size": hidden, "num_heads": heads, **config.values}, config.source
    )
    renamed = {native_xlstm.TABLE.embedding: (vocab, hidden), **shapes}
    return native_xlstm.model_section(found, renamed)
