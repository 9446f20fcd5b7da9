"""Types and argument checks that the sLSTM functions share."""

from torch import Tensor

from xlstm_kernels.common.checks import check_choice, check_float, check_like, check_state

FORGET_GATES = ("sigmoid", "exp")
INPUT_GATES = ("exp", "sigmoid")

CELLS = ("slstm", "slstm_sigmoid", "lstm")
"""What one step of a scan computes from its pre-activations: the sLSTM, the sLSTM with a sigmoid
input gate, and the LSTM, whose state has no n and m."""

State = tuple[Tensor, Tensor, Tensor, Tensor]
"""(h, c, n, m), each [b, heads, d]."""


def check_arguments(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: State | None,
    forget_gate: str,
    input_gate: str,
    *,
    time: bool,
) -> None:
    """Check shapes, dtypes and devices; `time` says whether there is a sequence axis s.

    Raises ValueError with the value, the rule and the remedy.
    """
    layout = "[b, s, 4, heads, d]" if time else "[b, 4, heads, d]"
    check_float("gate_preacts", gate_preacts, 5 if time else 4, layout)
    gates, heads, d = gate_preacts.shape[-3:]
    if gates != 4:
        raise ValueError(
            f"gate_preacts has {gates} gates, but {layout} has the four i, f, z, o; stack them"
        )
    weight_layout = "[4, heads, d_in, d_out]"
    check_like("recurrent_weight", recurrent_weight, (4, heads, d, d), weight_layout, gate_preacts)
    check_like("bias", bias, (4, heads, d), "[4, heads, d]", gate_preacts)
    check_choice("forget_gate", forget_gate, FORGET_GATES)
    check_choice("input_gate", input_gate, INPUT_GATES)
    if state is not None:
        part = ((gate_preacts.shape[0], heads, d), "[b, heads, d]")
        check_state(state, {name: part for name in "hcnm"}, gate_preacts)


def cell_of(input_gate: str) -> str:
    """The sLSTM's entry of `CELLS` with this input gate."""
    return "slstm" if input_gate == "exp" else "slstm_sigmoid"
