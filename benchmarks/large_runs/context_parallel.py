"""One rank's memory and traffic under context parallelism, counted.

    python -m benchmarks.large_runs.context_parallel pretrain/configs/xlstm_7b.yaml

It prints a table for rows of 128 k and 1 M tokens (one row per micro-batch, no tensor parallelism,
one data-parallel replica).
Nothing here is a measurement: bytes follow from shapes (`benchmarks.counting.context_costs`,
`benchmarks.large_runs.activation_memory`), and no time is given.
"""

import argparse

from benchmarks.counting.context_costs import model_costs
from benchmarks.large_runs.activation_memory import kept_by_block
from pretrain.config import load_config
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.sizes.parameters import count_parameters

LENGTHS = (131_072, 1_048_576)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
HEADER = """
parameters  bf16 weights, fp32 gradients, and the ranks' share of the optimizer's 12 bytes
selective,  activations that all blocks keep for the backward pass, recomputing selectively or
full        in full
cp kept     what context parallelism keeps on top, in all blocks (in full: in one at a time)
working     the largest extra memory of one call
received    by one block, forward and backward together
steps       of one block's messages until the last rank has the last, forward and backward

row length   cp  tokens/rank  parameters  selective     full  cp kept   working  received  steps
                                      GB         GB       GB       MB        MB        MB
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="a run file")
    args = parser.parse_args()
    run = load_config(args.config)
    letters = parse_pattern(run.model.pattern).letters
    parameters = count_parameters(run.model)["total"]
    print(f"{args.config}: {parameters:,} parameters; counted, not measured{HEADER}", end="")
    for length in LENGTHS:
        for ranks in RANKS:
            tokens = length // ranks
            costs = model_costs(run.model, tokens, ranks)
            blocks = {}
            for mode in ("selective", "full"):
                kept = kept_by_block(run, tokens, mode)
                blocks[mode] = sum(kept[letter] for letter in letters) / 1e9
            print(
                f"{length:10,} {ranks:4} {tokens:12,} "
                f"{parameters * (6 + 12 / ranks) / 1e9:11.1f} "
                f"{blocks['selective']:10.1f} {blocks['full']:8.1f} "
                f"{costs.kept / 1e6:8.1f} {costs.working / 1e6:9.1f} "
                f"{costs.received / len(letters) / 1e6:9.2f} "
                f"{costs.messages // len(letters):6}"
            )


if __name__ == "__main__":
    main()
