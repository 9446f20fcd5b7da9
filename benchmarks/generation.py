"""Speed of generation beside transformers, on the same weights in one process on the CPU.

    python -m benchmarks.generation

An export of `M` blocks with random weights is written, loaded by transformers, and imported as a
checkpoint of ours. Both sides read the same prompts and continue them greedily, in turns. Prefill
lasts until the first forward pass has ended. Those after it give the speed of generation. Both
sides of a round are measured one after the other, and the median of the rounds' ratios counts:
whatever else the machine does then slows both. Greedy tokens are compared too: what is fast must
also be right.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.import_memory import write_folder
from xlstm_mcore.convert.cli import main as convert
from xlstm_mcore.generation.generate import generate
from xlstm_mcore.generation.settings import Sampling
from xlstm_mcore.inference import open_model, prepare_for_tokens
from xlstm_mcore.settings import ModelConfig

GOAL = 1.3  # times transformers' speed, at batch 1 and 16
SIDES = ("ours", "transformers")


class Numbers:
    """Stands in for a tokenizer: a text is numbers with spaces between, and no token ends it."""

    eos_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def prompt_ids(self, text: str) -> list[int]:
        """The numbers of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """No text: this is about tokens."""
        return ""


Side = Callable[[torch.Tensor, int], tuple[torch.Tensor, list[float]]]


def sides(options: argparse.Namespace, folder: Path) -> dict[str, Side]:
    """A function of prompts [b, s] and a number of tokens, for both sides.

    It returns the tokens that were added [b, n], and when each forward pass ended.
    """
    config = ModelConfig(
        pattern="M" * options.layers,
        hidden_size=options.hidden,
        num_heads=4,
        vocab_size=options.vocab,
    )
    (folder / "hf").mkdir()
    write_folder(folder / "hf", config)
    with open(os.devnull, "w") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            assert convert(["from-hf", str(folder / "hf"), str(folder / "run")]) == 0
        finally:
            sys.stdout = shown
    ours, numbers = open_model(folder / "run"), Numbers(options.vocab)
    prepare_for_tokens(ours)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    ends: list[float] = []
    for model in (ours, theirs):
        model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))

    def by_us(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        texts = [" ".join(map(str, row)) for row in prompts.tolist()]
        sampling = Sampling(max_tokens=tokens, temperature=0)
        done = generate(ours, numbers, texts, sampling, batch=len(texts))
        return torch.tensor([completion.tokens for completion in done])

    def by_them(prompts: torch.Tensor, tokens: int) -> torch.Tensor:
        whole = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            use_cache=True,
        )
        return whole[:, prompts.shape[1] :]

    def timed(run: Callable[[torch.Tensor, int], torch.Tensor]) -> Side:
        def timed_run(prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, list[float]]:
            ends.clear()
            return run(prompts, tokens), list(ends)

        return timed_run

    return {side: timed(run) for side, run in zip(SIDES, (by_us, by_them), strict=True)}


def measure(
    contestants: dict[str, Side], batch: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median seconds of a prefill, and of a generated token of the whole batch, by side.

    `ratio` has the medians over rounds of how many times as fast ours is.
    """
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randint(options.vocab, (batch, options.prompt), generator=rng)
    times: dict[str, dict[str, list[float]]] = {s: {"prefill": [], "token": []} for s in SIDES}
    found = {}
    for number in range(1 + options.rounds):
        for side, run in contestants.items():
            begin = time.perf_counter()
            found[side], ends = run(prompts, 1 + options.tokens)
            if number:  # the first round warms up
                times[side]["prefill"].append(ends[0] - begin)
                times[side]["token"].append((ends[-1] - ends[0]) / options.tokens)
    same = (found["ours"] == found["transformers"]).float().mean().item()
    medians = {
        side: {name: statistics.median(values) for name, values in measured.items()}
        for side, measured in times.items()
    }
    ours, theirs = (times[side] for side in SIDES)
    ratios = {
        name: statistics.median(b / a for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ours
    }
    return medians | {"ratio": ratios, "equal": {"tokens": same}}


def main() -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=6, help="how many blocks")
    parser.add_argument("--vocab", type=int, default=8192, help="rows of the embedding")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="prompts at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are added")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("build/generation.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(
        f"d {options.hidden}, {options.layers} blocks, vocabulary {options.vocab}, prompts of "
        f"{options.prompt} tokens and {options.tokens} more; {options.threads} threads, medians "
        f"of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        contestants = sides(options, Path(folder))
        for batch in options.batches:
            results[batch] = found = measure(contestants, batch, options)
            print(f"\nbatch {batch:<9} prefill tokens/s   generated tokens/s")
            for side in SIDES:
                prefill = batch * options.prompt / found[side]["prefill"]
                print(f"  {side:13} {prefill:16,.0f}   {batch / found[side]['token']:18,.1f}")
            ratios = found["ratio"]
            met = "met" if ratios["token"] >= GOAL else "MISSED"
            print(
                f"  ours is {ratios['prefill']:.2f}x and {ratios['token']:.2f}x as fast (goal of "
                f"the second {GOAL}x: {met}); {found['equal']['tokens']:.0%} of the greedy tokens "
                "are equal"
            )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
