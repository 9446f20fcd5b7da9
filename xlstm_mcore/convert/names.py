"""The table of tensors: our global names, Hugging Face's names, shapes.

One row per kind of tensor; `{n}` is the layer number. On both sides all weights are (out, in), each
projection is a tensor of its own, and norm weights are plain, so converting is renaming.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from xlstm_mcore.parameters.names import EMBEDDING, FINAL_NORM, OUTPUT

#: Global name, name in transformers' `xlstm`, shape in the dimensions of `Dimensions`.
TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (EMBEDDING, "backbone.embeddings.weight", ("vocab", "hidden")),
    ("decoder.layers.{n}.mixer_norm.weight", "backbone.blocks.{n}.norm_mlstm.weight", ("hidden",)),
    *(
        (f"decoder.layers.{{n}}.mixer.{ours}", f"backbone.blocks.{{n}}.mlstm_layer.{theirs}", shape)
        for ours, theirs, shape in (
            ("q_proj.weight", "q.weight", ("qk", "hidden")),
            ("k_proj.weight", "k.weight", ("qk", "hidden")),
            ("v_proj.weight", "v.weight", ("v", "hidden")),
            ("ogate.weight", "ogate_preact.weight", ("v", "hidden")),
            ("igate.weight", "igate_preact.weight", ("heads", "hidden")),
            ("igate.bias", "igate_preact.bias", ("heads",)),
            ("fgate.weight", "fgate_preact.weight", ("heads", "hidden")),
            ("fgate.bias", "fgate_preact.bias", ("heads",)),
            ("head_norm.weight", "multihead_norm.weight", ("v",)),
            ("out_proj.weight", "out_proj.weight", ("hidden", "v")),
        )
    ),
    ("decoder.layers.{n}.ffn_norm.weight", "backbone.blocks.{n}.norm_ffn.weight", ("hidden",)),
    *(
        (f"decoder.layers.{{n}}.ffn.{ours}.weight", f"backbone.blocks.{{n}}.ffn.{theirs}.weight", s)
        for ours, theirs, s in (
            ("gate_proj", "proj_up_gate", ("ffn", "hidden")),
            ("up_proj", "proj_up", ("ffn", "hidden")),
            ("down_proj", "proj_down", ("hidden", "ffn")),
        )
    ),
    (FINAL_NORM, "backbone.out_norm.weight", ("hidden",)),
    (OUTPUT, "lm_head.weight", ("vocab", "hidden")),
)


@dataclass(frozen=True)
class Dimensions:
    """Sizes that the shapes of TABLE are made of, and the number of layers."""

    layers: int
    vocab: int
    hidden: int
    qk: int
    v: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Row:
    """One tensor: global name, Hugging Face name, shape."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


def rows(dimensions: Dimensions) -> Iterator[Row]:
    """All tensors of a 7B-style model, in the order of the forward pass."""

    def row(entry, n: int | None = None) -> Row:
        ours, theirs, shape = entry
        return Row(
            ours.format(n=n), theirs.format(n=n), tuple(getattr(dimensions, s) for s in shape)
        )

    per_layer = [entry for entry in TABLE if "{n}" in entry[0]]
    first = TABLE.index(per_layer[0])
    yield from (row(entry) for entry in TABLE[:first])
    for n in range(dimensions.layers):
        yield from (row(entry, n) for entry in per_layer)
    yield from (row(entry) for entry in TABLE[first + len(per_layer) :])
