"""What tables of tensors are made of: our names with their shapes, and how a family renames them.

A family (`xlstm_mcore.convert.families`) is one foreign format. Its table says, for every kind of
block, which tensors of ours become which of theirs. It is written once and read in both directions:
`rows` of a table is what an export writes and what an import looks for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_mcore.parameters.names import EMBEDDING, FINAL_NORM, OUTPUT
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions

Shape = tuple[int, ...]

_FEED_FORWARD = {
    "ffn_norm.weight": ("hidden",),
    "ffn.gate_proj.weight": ("ffn", "hidden"),
    "ffn.up_proj.weight": ("ffn", "hidden"),
    "ffn.down_proj.weight": ("hidden", "ffn"),
}

#: Our tensors of a layer by the letter of its block: name after `decoder.layers.{n}.`, and shape in
#: the words of `sizes_of`. A tensor with a size of 0 does not exist (a convolution without taps).
LAYER_TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "M": {
        "mixer_norm.weight": ("hidden",),
        "mixer.q_proj.weight": ("qk", "hidden"),
        "mixer.k_proj.weight": ("qk", "hidden"),
        "mixer.v_proj.weight": ("v", "hidden"),
        "mixer.ogate.weight": ("v", "hidden"),
        "mixer.igate.weight": ("heads", "hidden"),
        "mixer.igate.bias": ("heads",),
        "mixer.fgate.weight": ("heads", "hidden"),
        "mixer.fgate.bias": ("heads",),
        "mixer.head_norm.weight": ("v",),
        "mixer.out_proj.weight": ("hidden", "v"),
        **_FEED_FORWARD,
    },
    "m": {
        "mixer_norm.weight": ("hidden",),
        "mixer.up_proj.weight": ("up", "hidden"),
        "mixer.z_proj.weight": ("up", "hidden"),
        "mixer.conv.weight": ("up", "conv"),
        "mixer.conv.bias": ("up if conv",),
        "mixer.q_proj.weight": ("qkv_blocks", "qkv_block", "qkv_block"),
        "mixer.k_proj.weight": ("qkv_blocks", "qkv_block", "qkv_block"),
        "mixer.v_proj.weight": ("qkv_blocks", "qkv_block", "qkv_block"),
        "mixer.igate.weight": ("heads", "3 up"),
        "mixer.igate.bias": ("heads",),
        "mixer.fgate.weight": ("heads", "3 up"),
        "mixer.fgate.bias": ("heads",),
        "mixer.head_norm.weight": ("up",),
        "mixer.learnable_skip": ("up",),
        "mixer.out_proj.weight": ("hidden", "up"),
    },
    "s": {
        "mixer_norm.weight": ("hidden",),
        "mixer.conv.weight": ("hidden", "slstm conv"),
        "mixer.conv.bias": ("hidden if slstm conv",),
        "mixer.igate.weight": ("heads", "head", "head"),
        "mixer.fgate.weight": ("heads", "head", "head"),
        "mixer.zgate.weight": ("heads", "head", "head"),
        "mixer.ogate.weight": ("heads", "head", "head"),
        "mixer.recurrent_weight": ("4", "heads", "head", "head"),
        "mixer.bias": ("4", "heads", "head"),
        "mixer.head_norm.weight": ("hidden",),
        "ffn_norm.weight": ("hidden if slstm_ffn",),
        "ffn.gate_proj.weight": ("slstm_ffn", "hidden"),
        "ffn.up_proj.weight": ("slstm_ffn", "hidden"),
        "ffn.down_proj.weight": ("hidden", "slstm_ffn"),
    },
    "*": {
        "mixer_norm.weight": ("hidden",),
        "mixer.q_proj.weight": ("q", "hidden"),
        "mixer.k_proj.weight": ("kv", "hidden"),
        "mixer.v_proj.weight": ("kv", "hidden"),
        "mixer.out_proj.weight": ("hidden", "q"),
        **_FEED_FORWARD,
    },
}

LAYER_TENSORS["l"] = LAYER_TENSORS["s"]

#: Our tensors around the layers.
MODEL_TENSORS: dict[str, tuple[str, ...]] = {
    EMBEDDING: ("vocab", "hidden"),
    FINAL_NORM: ("hidden",),
    OUTPUT: ("vocab", "hidden"),
}


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """The sizes that the shapes of a model's tensors are made of, by the words of the tables."""
    widths = dimensions(model)
    q_heads, kv_heads = attention_heads(model)
    attention_head = model.hidden_size // q_heads
    return {
        "4": 4,  # the sLSTM's gates i, f, z, o
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "heads": model.num_heads,
        "head": model.hidden_size // model.num_heads,
        "qk": widths.qk,
        "v": widths.v,
        "ffn": widths.ffn,
        "up": widths.up,
        "3 up": 3 * widths.up,
        "qkv_blocks": widths.up // model.qkv_block_size,
        "qkv_block": model.qkv_block_size,
        "conv": model.conv_width,
        "up if conv": widths.up if model.conv_width else 0,
        "slstm conv": widths.slstm_conv,
        "hidden if slstm conv": model.hidden_size if widths.slstm_conv else 0,
        "slstm_ffn": widths.slstm_ffn,
        "hidden if slstm_ffn": model.hidden_size if widths.slstm_ffn else 0,
        "q": q_heads * attention_head,
        "kv": kv_heads * attention_head,
    }


@dataclass(frozen=True)
class Transform:
    """How tensors of ours become one of theirs, and back.

    Attributes:
        name: What it does, for the printed table.
        shape: Their shape, from the shapes of ours.
        to_theirs: Their tensor, from ours.
        to_ours: Our tensors, from theirs and the shapes of ours.
        exact: Whether every bit is kept; if not, it computes in fp32 at least.
    """

    name: str
    shape: Callable[[Sequence[Shape]], Shape]
    to_theirs: Callable[[Sequence[Tensor]], Tensor]
    to_ours: Callable[[Tensor, Sequence[Shape]], tuple[Tensor, ...]]
    exact: bool = True


#: The same tensor under another name.
RENAME = Transform(
    "rename",
    shape=lambda shapes: shapes[0],
    to_theirs=lambda ours: ours[0],
    to_ours=lambda theirs, shapes: (theirs,),
)

#: Several tensors of ours, one below the other.
STACK = Transform(
    "stack",
    shape=lambda shapes: (sum(shape[0] for shape in shapes), *shapes[0][1:]),
    to_theirs=lambda ours: torch.cat(list(ours)),
    to_ours=lambda theirs, shapes: theirs.split([shape[0] for shape in shapes]),
)


@dataclass(frozen=True)
class Entry:
    """One line of a table: tensors of ours, their tensor, and the way between.

    Attributes:
        ours: Names, in a layer those after `decoder.layers.{n}.`.
        theirs: Name, in a layer the one after the family's prefix.
        transform: How the one becomes the other.
    """

    ours: tuple[str, ...]
    theirs: str
    transform: Transform = RENAME


def renames(names: Mapping[str, str]) -> tuple[Entry, ...]:
    """Entries for tensors that have another name and are the same otherwise."""
    return tuple(Entry((ours,), theirs) for ours, theirs in names.items())


@dataclass(frozen=True)
class Table:
    """The tensors of a family.

    Attributes:
        embedding: Their name of the embedding.
        final_norm: Their name of the final norm's weight.
        head: Their name of the output layer's weight. A tied model has none.
        prefix: What stands before their names of a layer, with `{n}` for its number.
        layers: The tensors of a layer by the letter of its block.
        final_norm_transform: How the final norm's weight is stored.
    """

    embedding: str
    final_norm: str
    head: str
    prefix: str
    layers: Mapping[str, tuple[Entry, ...]]
    final_norm_transform: Transform = RENAME


@dataclass(frozen=True)
class Row:
    """One tensor of theirs and what it is made of.

    Attributes:
        ours: Global names.
        shapes: Shapes of ours, in that order.
        theirs: Their name.
        shape: Their shape.
        transform: How ours become theirs, and back.
    """

    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    theirs: str
    shape: Shape
    transform: Transform

    @property
    def has_vocabulary(self) -> bool:
        """Whether the first dimension is the vocabulary."""
        return self.ours[0] in (EMBEDDING, OUTPUT)


def rows(table: Table, model: ModelConfig) -> Iterator[Row]:
    """All tensors of a model in a family's format, in the order of the forward pass.

    Args:
        table: The family's table; it has the letters of the model's pattern.
        model: The model.
    """
    sizes = sizes_of(model)

    def row(entry: Entry, tensors: Mapping[str, tuple[str, ...]], prefix: str, theirs: str) -> Row:
        shapes = tuple(tuple(sizes[word] for word in tensors[name]) for name in entry.ours)
        ours = tuple(prefix + name for name in entry.ours)
        shape = entry.transform.shape(shapes)
        return Row(ours, shapes, theirs + entry.theirs, shape, entry.transform)

    yield row(Entry((EMBEDDING,), table.embedding), MODEL_TENSORS, "", "")
    for n, letter in enumerate(parse_pattern(model.pattern).letters):
        for entry in table.layers[letter]:
            there = row(
                entry, LAYER_TENSORS[letter], f"decoder.layers.{n}.", table.prefix.format(n=n)
            )
            if 0 not in there.shape:
                yield there
    norm = Entry((FINAL_NORM,), table.final_norm, table.final_norm_transform)
    yield row(norm, MODEL_TENSORS, "", "")
    if not model.tie_embeddings:
        yield row(Entry((OUTPUT,), table.head), MODEL_TENSORS, "", "")
