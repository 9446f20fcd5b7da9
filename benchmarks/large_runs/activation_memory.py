"""Bytes of activations that a model keeps for its backward pass, counted without computing them.

    python -m benchmarks.large_runs.activation_memory pretrain/configs/xlstm_7b.yaml

It builds each kind of block of a run file with its true widths on the device that does not exist
(shapes without memory), runs its forward pass with the Triton kernels' own rules for what they
save, and counts what autograd holds. Nothing here is a measurement: no allocator's rounding, no
workspace, no weights, gradients or optimizer state.
"""

import argparse
from collections import Counter

import torch

from benchmarks.counting.saved_memory import count_saved
from pretrain import layout as layouts
from pretrain.config import RunConfig, load_config
from pretrain.rehearsal.device import RehearsalMode, as_rank, device
from pretrain.rehearsal.record import RankRecord
from xlstm_mcore.build import make_config
from xlstm_mcore.layer import XLSTMLayer, layer_spec
from xlstm_mcore.recompute import MODES


def kept_by_block(run: RunConfig, tokens: int, mode: str) -> dict[str, int]:
    """Bytes that one block of each kind keeps for one row of `tokens` tokens, in one process."""
    model = run.model.model_dump()
    model |= {"pattern": model["pattern"].replace("|", ""), "kernel_backend": "triton"}
    memory = run.memory.model_dump() | {"recompute": mode}
    config = make_config(model, precision=run.engine.precision, memory=memory)
    kept = {}
    fake = RehearsalMode(RankRecord(0))
    with as_rank(0, 1, fake):
        layout = layouts.start(run.model_copy(update={"layout": type(run.layout)()}))
        try:
            for letter in sorted(set(config.layer_letters)):
                number = config.layer_letters.index(letter)
                with fake:
                    submodules = layer_spec(letter, config).submodules
                    layer = XLSTMLayer(config, submodules, layout.groups, layer_number=number)
                    x = torch.empty(
                        (tokens, config.hidden_size),
                        dtype=config.params_dtype,
                        device=device(),
                        requires_grad=True,
                    )
                    with count_saved(layer.parameters()) as saved:
                        layer(x, 1, None)
                    kept[letter] = saved.bytes
        finally:
            layout.close()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="a run file")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a row on one process")
    args = parser.parse_args()
    run = load_config(args.config)
    model = run.model.model_dump()
    blocks = Counter(model["pattern"].replace("|", ""))
    print(f"{args.config}: one row of {args.tokens:,} tokens, {run.engine.precision}, one process")
    print("counted, not measured; GB of activations kept by all blocks, MB by one of each kind")
    for mode in MODES:
        try:
            kept = kept_by_block(run, args.tokens, mode)
        except ValueError as error:  # heads that the Triton kernels do not have
            parser.exit(2, f"error: {error}\n")
        total = sum(kept[letter] * number for letter, number in blocks.items())
        each = ", ".join(f"{letter} {size / 1e6:,.1f}" for letter, size in kept.items())
        print(f"  {mode:9}  {total / 1e9:8.2f} GB   ({each} MB)")


if __name__ == "__main__":
    main()
