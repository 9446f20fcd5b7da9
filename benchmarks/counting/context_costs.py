"""What context parallelism costs one rank, by arithmetic: bytes kept, bytes received, messages.

Everything is per block and micro-batch, forward and backward together. What a rank sends another
receives, so only what is received is counted. Nothing here is a measurement.
"""

from dataclasses import dataclass

from xlstm_mcore.parallel.mlstm_state import column_slices, gathers
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions


@dataclass(frozen=True)
class Costs:
    """Costs of one block, or of several together, on one rank.

    Attributes:
        kept: Bytes held between forward and backward because of context parallelism.
        working: Largest extra bytes during a call, which are freed after it.
        received: Bytes received, forward and backward together.
        messages: Messages that follow one after the other until the last rank has the last one,
            forward and backward together.
    """

    kept: int = 0
    working: int = 0
    received: int = 0
    messages: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        """Costs of both, one after the other."""
        return Costs(
            self.kept + other.kept,
            max(self.working, other.working),
            self.received + other.received,
            self.messages + other.messages,
        )


def state_costs(
    rows: int, qk_dim: int, v_dim: int, tokens: int, ranks: int, itemsize: int = 4
) -> Costs:
    """Costs of one mLSTM cell's state (parallel/mlstm_state.py), on a rank in the middle.

    Args:
        rows: Heads on this rank times rows of the micro-batch.
        qk_dim: Width of q and k of a head.
        v_dim: Width of v of a head.
        tokens: Tokens of a row on this rank.
        ranks: Context-parallel size.
        itemsize: Bytes of an element of the state.
    """
    if ranks == 1:
        return Costs()
    state = rows * qk_dim * (v_dim + 1)  # C and n
    # Log weights and forget gates in fp64 (a CPU's log sigmoid keeps 8 bytes more).
    gates = tokens * rows * 16
    weighted = tokens * rows * qk_dim * itemsize  # w k, and its gradient in the backward pass
    if gathers(ranks):
        extra = rows * 16  # two fp64 numbers of the gates
        return Costs(
            kept=gates + itemsize * (state + rows * (ranks + 1)),
            working=2 * weighted + itemsize * (ranks + 1) * state,
            received=(ranks - 1) * (2 * itemsize * state + extra),
            messages=2,
        )
    return Costs(
        kept=gates + itemsize * (state + 2 * rows),
        working=2 * weighted + itemsize * 2 * state,
        received=itemsize * (2 * state + rows),
        messages=2 * (ranks - 1 + len(column_slices(v_dim))),
    )


def block_costs(
    letter: str,
    model: ModelConfig,
    tokens: int,
    ranks: int,
    tensor: int = 1,
    micro_batch: int = 1,
    activation_bytes: int = 2,
) -> Costs:
    """Costs of one block.

    Args:
        letter: The block's letter.
        model: The model section.
        tokens: Tokens of a row on this rank, `s / cp`.
        ranks: Context-parallel size.
        tensor: Tensor-parallel size.
        micro_batch: Rows.
        activation_bytes: Bytes of an element of an activation.
    """
    dims, heads = dimensions(model), model.num_heads
    rows = heads // tensor * micro_batch
    if ranks == 1:
        return Costs()
    if letter == "M":
        return state_costs(rows, dims.qk // heads, dims.v // heads, tokens, ranks)
    if letter == "m":
        width = dims.up // heads
        halo = (model.conv_width - 1) * micro_batch * dims.up // tensor * activation_bytes
        state = state_costs(rows, width, width, tokens, ranks)
        return state + Costs(received=2 * max(0, halo), messages=2 if halo > 0 else 0)
    # s and *: to heads and back, each with its backward pass
    if letter == "s":
        channels = 2 * model.hidden_size
    else:
        attention, kv = attention_heads(model)
        channels = 2 * model.hidden_size + 2 * model.hidden_size // attention * kv
    moved = tokens * micro_batch * channels // tensor * activation_bytes * (ranks - 1) // ranks
    calls = 2 if letter == "s" else 4
    return Costs(working=2 * moved, received=2 * moved, messages=2 * calls)


def model_costs(
    model: ModelConfig, tokens: int, ranks: int, tensor: int = 1, micro_batch: int = 1
) -> Costs:
    """Costs of all blocks: `kept`, `received` and `messages` add up, `working` is the largest."""
    total = Costs()
    for letter in parse_pattern(model.pattern).letters:
        total += block_costs(letter, model, tokens, ranks, tensor, micro_batch)
    return total
