"""State tracking: the sLSTM learns parity and extrapolates to longer rows, the mLSTM does not.

    python -m benchmarks.parity

Two-block models of the project's own blocks read random bits and predict, at every position, the
parity of all bits so far (arXiv 2405.04517, section 4.1 and appendix B.1: "models without memory
mixing cannot solve parity"). Trained on rows of 40, tested at positions 21 to 40 and, on rows of
256, at 41 to 256. Early positions are left out of the test since a few bits can be counted without
a state. Chance is 50 %.

The paper trains for 100,000 steps on a last label alone and searches over learning rates; here
every position is a label, so that minutes on a CPU are enough. Expected: `ss` at least 99 % at
trained lengths and above 90 % beyond, `mm` near chance.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups

TRAINED, BEYOND = 40, 256
VOCAB = 8  # 0 and 1 are the bits read, 2 and 3 the answers


def rows(batch: int, length: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits and the parity of each prefix, int64 `[batch, length]`."""
    bits = torch.randint(0, 2, (batch, length), generator=rng)
    return bits, bits.cumsum(1) % 2


def accuracy(model, length: int, first: int) -> float:
    """Share of right answers at positions `first` (from 1) to `length` of fresh rows."""
    bits, parity = rows(256, length, torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = model(bits)[..., 2:4].argmax(-1)
    return (answers == parity)[:, first - 1 :].float().mean().item()


def train(pattern: str, arguments: argparse.Namespace) -> dict:
    """Train one model; accuracies at trained and longer lengths, and seconds."""
    config = make_config(
        {
            "pattern": pattern,
            "hidden_size": 64,
            "num_heads": 1,
            "vocab_size": VOCAB,
            "norm": "layernorm",
            "norm_eps": 1e-5,
            "logit_soft_cap": None,
        }
    )
    (model,) = build_model(config, single_process_groups(), seed=arguments.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.1
    )
    warmup = max(1, arguments.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / arguments.steps)) / 2),
    )
    rng = torch.Generator().manual_seed(arguments.seed)
    started = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        bits, parity = rows(arguments.batch, TRAINED, rng)
        loss = model(bits, None, parity + 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % warmup == 0:
            print(f"  {pattern} step {step:5}  loss {loss.item():.3f}", flush=True)
    model.eval()
    return {
        "trained": accuracy(model, TRAINED, TRAINED // 2 + 1),
        "beyond": accuracy(model, BEYOND, TRAINED + 1),
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    """Train both, print, write JSON; 1 when the papers' statement does not come out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--patterns", nargs="+", default=["ss", "ms", "mm", "MM"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("build/parity.json"))
    arguments = parser.parse_args()
    results = {pattern: train(pattern, arguments) for pattern in arguments.patterns}
    print(f"\nparity     positions 21-{TRAINED}  41-{BEYOND}   seconds")
    for pattern, one in results.items():
        print(f"{pattern:10} {one['trained']:14.1%} {one['beyond']:8.1%} {one['seconds']:9.0f}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [
        pattern
        for pattern, one in results.items()
        if (one["trained"] < 0.99) == ("s" in pattern) or ("s" in pattern and one["beyond"] < 0.9)
    ]
    if wrong:
        print(f"not as the paper says: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
