"""State dicts of pip `xlstm`'s xLSTMLMModel: the classic blocks of the first paper.

What is special about them:

- A norm's weight is stored as its distance from 1.
- The sLSTM's `fgate` projection feeds the input gate and `igate` the forget gate; biases and
  recurrent weights have the true order i, f, z, o.
- Recurrent weights and biases lie in the order that the backend likes: `[heads, 4 out, in]` and
  `[4, heads, d]` for the one in Python (`vanilla`), `[heads, in, 4 out]` and `[heads, 4, d]` for
  the compiled one.

It has no configuration beside it: sizes are read from the weights, and the rest are the class's
defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.imports.config import ForeignConfig, count_layers, shape_of, width_keys
from xlstm_mcore.convert.tables import STACK, Entry, Shape, Table, Transform, renames

NAME = "xLSTMLMModel"
PREFIX = "xlstm_block_stack.blocks.{n}."

PLUS_ONE = Transform(
    "+ 1",
    shape=lambda shapes: shapes[0],
    to_theirs=lambda ours: ours[0] - 1,
    to_ours=lambda theirs, shapes: (theirs + 1,),
    exact=False,
)

#: Depthwise: torch keeps a dimension for the one input channel of each group.
CONV = Transform(
    "one channel",
    shape=lambda shapes: (shapes[0][0], 1, shapes[0][1]),
    to_theirs=lambda ours: ours[0].unsqueeze(1),
    to_ours=lambda theirs, shapes: (theirs.squeeze(1),),
)


def _vanilla_shape(shapes: Sequence[Shape]) -> Shape:
    gates, heads, d_in, d_out = shapes[0]
    return heads, gates * d_out, d_in


def _compiled_shape(shapes: Sequence[Shape]) -> Shape:
    gates, heads, d_in, d_out = shapes[0]
    return heads, d_in, gates * d_out


def _from_vanilla(theirs: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    gates, heads, d_in, d_out = shapes[0]
    return (theirs.reshape(heads, gates, d_out, d_in).permute(1, 0, 3, 2),)


def _from_compiled(theirs: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    gates, heads, d_in, d_out = shapes[0]
    return (theirs.reshape(heads, d_in, gates, d_out).permute(2, 0, 1, 3),)


def _flat(shapes: Sequence[Shape]) -> Shape:
    gates, heads, d = shapes[0]
    return (gates * heads * d,)


#: By the backend that wrote them: recurrent weights, biases.
RECURRENT = {
    "vanilla": (
        Transform(
            "recurrent, vanilla",
            shape=_vanilla_shape,
            to_theirs=lambda ours: ours[0].permute(1, 0, 3, 2).flatten(1, 2),
            to_ours=_from_vanilla,
        ),
        Transform(
            "bias, vanilla",
            shape=_flat,
            to_theirs=lambda ours: ours[0].flatten(),
            to_ours=lambda theirs, shapes: (theirs.reshape(shapes[0]),),
        ),
    ),
    "compiled": (
        Transform(
            "recurrent, compiled",
            shape=_compiled_shape,
            to_theirs=lambda ours: ours[0].permute(1, 2, 0, 3).flatten(2),
            to_ours=_from_compiled,
        ),
        Transform(
            "bias, compiled",
            shape=_flat,
            to_theirs=lambda ours: ours[0].transpose(0, 1).flatten(),
            to_ours=lambda theirs, shapes: (
                theirs.reshape(shapes[0][1], 4, shapes[0][2]).transpose(0, 1),
            ),
        ),
    ),
}

_CONVOLUTION = (
    Entry(("mixer.conv.weight",), "xlstm.conv1d.conv.weight", CONV),
    *renames({"mixer.conv.bias": "xlstm.conv1d.conv.bias"}),
)

_MLSTM = (
    Entry(("mixer_norm.weight",), "xlstm_norm.weight", PLUS_ONE),
    Entry(("mixer.up_proj.weight", "mixer.z_proj.weight"), "xlstm.proj_up.weight", STACK),
    *_CONVOLUTION,
    *renames(
        {
            **{f"mixer.{p}_proj.weight": f"xlstm.{p}_proj.weight" for p in "qkv"},
            **{
                f"mixer.{gate}.{kind}": f"xlstm.mlstm_cell.{gate}.{kind}"
                for gate in ("igate", "fgate")
                for kind in ("weight", "bias")
            },
        }
    ),
    Entry(("mixer.head_norm.weight",), "xlstm.mlstm_cell.outnorm.weight", PLUS_ONE),
    *renames(
        {
            "mixer.learnable_skip": "xlstm.learnable_skip",
            "mixer.out_proj.weight": "xlstm.proj_down.weight",
        }
    ),
)


def _slstm(backend: str) -> tuple[Entry, ...]:
    recurrent, bias = RECURRENT[backend]
    return (
        Entry(("mixer_norm.weight",), "xlstm_norm.weight", PLUS_ONE),
        *_CONVOLUTION,
        *renames(
            {
                "mixer.igate.weight": "xlstm.fgate.weight",
                "mixer.fgate.weight": "xlstm.igate.weight",
                "mixer.zgate.weight": "xlstm.zgate.weight",
                "mixer.ogate.weight": "xlstm.ogate.weight",
            }
        ),
        Entry(("mixer.recurrent_weight",), "xlstm.slstm_cell._recurrent_kernel_", recurrent),
        Entry(("mixer.bias",), "xlstm.slstm_cell._bias_", bias),
        Entry(("mixer.head_norm.weight",), "xlstm.group_norm.weight", PLUS_ONE),
        Entry(("ffn_norm.weight",), "ffn_norm.weight", PLUS_ONE),
        Entry(("ffn.gate_proj.weight", "ffn.up_proj.weight"), "ffn.proj_up.weight", STACK),
        *renames({"ffn.down_proj.weight": "ffn.proj_down.weight"}),
    )


def table(shapes: Mapping[str, Shape]) -> Table:
    """The table for the backend whose order the recurrent weights have."""
    kernels = [shape for name, shape in shapes.items() if name.endswith("._recurrent_kernel_")]
    wide = any(len(shape) == 3 and shape[2] == 4 * shape[1] for shape in kernels)
    return Table(
        embedding="token_embedding.weight",
        final_norm="xlstm_block_stack.post_blocks_norm.weight",
        head="lm_head.weight",
        prefix=PREFIX,
        layers={"m": _MLSTM, "s": _slstm("compiled" if wide else "vanilla")},
        final_norm_transform=PLUS_ONE,
    )


def model_section(config: ForeignConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `model:` section, read from the weights.

    Raises:
        ConvertError: the tensors are not those of such a model.
    """
    vocab, hidden = shape_of(shapes, "token_embedding.weight", 2)
    pattern, heads, conv, widths, block = "", set(), set(), {}, 4
    for n in range(count_layers(shapes, PREFIX)):
        prefix = PREFIX.format(n=n)
        conv_name = f"{prefix}xlstm.conv1d.conv.weight"
        conv.add(shape_of(shapes, conv_name, 3)[2] if conv_name in shapes else 0)
        if f"{prefix}xlstm.slstm_cell._recurrent_kernel_" in shapes:
            pattern += "s"
            heads.add(shape_of(shapes, f"{prefix}xlstm.fgate.weight", 3)[0])
            widths["slstm_ffn"] = shape_of(shapes, f"{prefix}ffn.proj_down.weight", 2)[1]
        else:
            pattern += "m"
            heads.add(shape_of(shapes, f"{prefix}xlstm.mlstm_cell.igate.bias", 1)[0])
            widths["up"] = shape_of(shapes, f"{prefix}xlstm.proj_down.weight", 2)[1]
            block = shape_of(shapes, f"{prefix}xlstm.q_proj.weight", 3)[1]
    if len(heads) > 1 or len(conv) > 1:
        raise ConvertError(
            f"blocks differ: heads {sorted(heads)}, taps of the convolution {sorted(conv)}; here "
            "all blocks of a model have the same"
        )
    return {
        "pattern": pattern,
        "hidden_size": hidden,
        "num_heads": heads.pop(),
        "vocab_size": vocab,
        "tie_embeddings": "lm_head.weight" not in shapes,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "logit_soft_cap": None,
        "conv_width": conv.pop(),
        "qkv_block_size": block,
        **width_keys(hidden, **widths),
    }
