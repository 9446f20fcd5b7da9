"""One training step on a CPU beside the peers', same shapes, in one run.

    python -m benchmarks.train_step_cpu                             ours and transformers'
    python -m benchmarks.train_step_cpu --peer-python ../peers/bin/python     pip xlstm's as well

A step is forward, backward and AdamW in fp32 on the same random tokens. Ours is what the trainer
runs: the Megatron engine in one process, gradient clipping included. transformers' `xlstm` runs its
native path; pip xlstm (tests/peers.txt, an environment of its own) runs its native backends. Every
model lives in a process of its own; they take turns, one step at a time, so that a busy machine
hits them alike. Medians over rounds. The share of the matrix limit is the model's FLOPs
(sizes/flops.py) in the step's time, over what a product of two 1024 x 1024 matrices reaches here in
the same minute.

Goals: 1.15x transformers' tokens/s; 2x pip xlstm's for classic [1:0], 3.3x for [3:1].
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from xlstm_io.allocator import SETTINGS

ROOT = Path(__file__).parents[1]
VOCAB, HIDDEN, HEADS, BLOCKS = 8192, 256, 4, 4
PATTERNS = {"large": "MMMM", "classic [1:0]": "mmmm", "classic [3:1]": "mmsm"}
# model -> (peer, its goal); the first entry of a peer is measured against
PEERS = {
    "large": {"transformers": 1.15, "pip xlstm": None},
    "classic [1:0]": {"pip xlstm": 2.0},
    "classic [3:1]": {"pip xlstm": 3.3},
}


def our_step(model: str, batch: int, length: int) -> Callable[[], None]:
    """A step of the trainer's engine."""
    import torch

    from pretrain import layout as layouts
    from pretrain.config import config_from_dict
    from pretrain.data import Batch
    from pretrain.engines.megatron import MegatronEngine
    from pretrain.trainer import train_step

    section = {
        "pattern": PATTERNS[model],
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "vocab_size": VOCAB,
    }
    if model != "large":
        section |= {"norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None}
    config = config_from_dict(
        {
            "run": {"dir": "unused", "steps": 1000},
            "model": section,
            "data": {
                "path": "unused",
                "seq_len": length,
                "global_batch": batch,
                "micro_batch": batch,
            },
        }
    )
    engine = MegatronEngine(config, layouts.start(config))
    tokens = torch.randint(0, VOCAB, (batch, length + 1))
    ones = torch.ones(batch, length)
    starts, sources = torch.zeros_like(ones).bool(), ones[:, :0].double()
    data = Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), ones, starts, sources)

    def step() -> None:
        train_step(engine, [data], 1e-4)

    return step


def peer_step(model: str, peer: str, batch: int, length: int) -> Callable[[], None]:
    """A step of a peer's model with torch's AdamW."""
    import torch
    from torch.nn.functional import cross_entropy

    if peer == "transformers":
        network = _transformers()
    elif model == "large":
        network = _xlstm_large()
    else:
        network = _xlstm_classic(PATTERNS[model], length)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCAB, (batch, length + 1))

    def step() -> None:
        out = network(tokens[:, :-1])
        logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
        cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _transformers():
    from transformers import xLSTMConfig, xLSTMForCausalLM

    return xLSTMForCausalLM(
        xLSTMConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            embedding_dim=HIDDEN,
            num_blocks=BLOCKS,
            num_hidden_layers=BLOCKS,
            num_heads=HEADS,
            ffn_proj_factor=2.667,
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            mode="train",
            return_last_states=True,  # without it the training mode cannot run
            use_cache=False,
        )
    )


def _xlstm_large():
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    return xLSTMLarge(
        xLSTMLargeConfig(
            embedding_dim=HIDDEN,
            num_heads=HEADS,
            num_blocks=BLOCKS,
            vocab_size=VOCAB,
            return_last_states=True,  # without it the training mode cannot run
            mode="train",
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
        )
    )


def _xlstm_classic(pattern: str, length: int):
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig
    from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig

    network = xLSTMLMModel(
        xLSTMLMModelConfig(
            vocab_size=VOCAB,
            embedding_dim=HIDDEN,
            context_length=length,
            num_blocks=BLOCKS,
            slstm_at=[n for n, letter in enumerate(pattern) if letter == "s"],
            mlstm_block=mLSTMBlockConfig(
                mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS)
            ),
            slstm_block=sLSTMBlockConfig(
                slstm=sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, conv1d_kernel_size=4),
                feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
        )
    )
    network.reset_parameters()
    return network


def matrix_limit() -> float:
    """GFLOP/s of a product of two 1024 x 1024 fp32 matrices, best of a few."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * 1024**3 / (time.perf_counter() - started) / 1e9)
    return best


def worker(model: str, peer: str, arguments: argparse.Namespace) -> None:
    """Serve steps: one line in, the step's seconds (or the matrix limit) out."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = arguments.batch, arguments.steps
    step = our_step(model, *sizes) if peer == "ours" else peer_step(model, peer, *sizes)
    step()  # compiles, allocates
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "limit":
            print(matrix_limit(), flush=True)
            continue
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)


class Contestant:
    """A model in a process of its own that takes one step when asked."""

    def __init__(self, model: str, peer: str, python: str, arguments: argparse.Namespace):
        self.peer, self.seconds = peer, []
        words = ["--worker", model, peer, "--batch", arguments.batch, "--steps", arguments.steps]
        words += ["--threads", arguments.threads]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(arguments.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # a waiting process must not spin on the others' cores
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # As a run does for itself: glibc would give memory back after each step.
        environment |= {name: str(value) for name, (_, value) in SETTINGS.items()}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.train_step_cpu", *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(log := tempfile.TemporaryFile(mode="w+")),
            text=True,
        )
        self.log = log

    def why(self) -> str:
        """The last line that a worker that cannot run has left."""
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or ["it said nothing"])[-1]

    def ready(self) -> bool:
        """Wait for the first step; False when the worker cannot run here."""
        return self._line() == "ready"

    def _line(self) -> str:
        for line in self.process.stdout:
            if line.strip() == "ready" or line.strip().replace(".", "").replace("e-", "").isdigit():
                return line.strip()
        return ""

    def ask(self, what: str) -> float:
        """Seconds of one step ("step"), or the matrix limit ("limit")."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(model: str, arguments: argparse.Namespace) -> dict:
    """Median seconds of each contestant of one model, and the matrix limit beside them."""
    pythons = {"ours": sys.executable, "transformers": sys.executable}
    pythons["pip xlstm"] = arguments.peer_python
    contestants = []
    for peer in ("ours", *PEERS[model]):
        contestant = Contestant(model, peer, pythons[peer], arguments)
        if contestant.ready():
            contestants.append(contestant)
        elif peer == "ours":
            raise SystemExit(f"our own step for {model} does not run: {contestant.why()}")
        else:
            print(f"{peer} does not run here: {contestant.why()}")
    limits = []
    for _ in range(arguments.rounds):
        limits.append(contestants[0].ask("limit"))
        for contestant in contestants:
            contestant.seconds.append(contestant.ask("step"))
    for contestant in contestants:
        contestant.close()
    return {
        "gflops_limit": statistics.median(limits),
        "seconds": {c.peer: statistics.median(c.seconds) for c in contestants},
    }


def report(model: str, data: dict, arguments: argparse.Namespace) -> None:
    """Print one model's table."""
    from pretrain.config.schema import ModelConfig
    from xlstm_mcore.sizes.flops import training_flops

    settings = ModelConfig(
        pattern=PATTERNS[model], hidden_size=HIDDEN, num_heads=HEADS, vocab_size=VOCAB
    )
    tokens = arguments.batch * arguments.steps
    flops = training_flops(settings) * tokens
    ours = data["seconds"]["ours"]
    print(f"\n{model:15} ms a step  tokens/s  of matrix limit  ours is")
    for peer, seconds in data["seconds"].items():
        share = flops / seconds / 1e9 / data["gflops_limit"]
        goal = PEERS[model].get(peer)
        beside = "" if peer == "ours" else f"{seconds / ours:5.2f}x faster"
        if goal is not None:
            beside += f" (goal {goal}x: {'met' if seconds / ours >= goal else 'MISSED'})"
        speed = f"{seconds * 1e3:9.0f}  {tokens / seconds:8,.0f}"
        print(f"  {peer:13} {speed}  {share:15.0%}  {beside}")
    if "pip xlstm" in PEERS[model] and "pip xlstm" not in data["seconds"]:
        print("  pip xlstm     see tests/peers.txt and --peer-python")


def main() -> int:
    """Measure all models, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has pip xlstm")
    parser.add_argument("--models", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=512, help="tokens per row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("build/train_step_cpu.json"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker, arguments)
        return 0
    print(
        f"d {HIDDEN}, {BLOCKS} blocks, {HEADS} heads, vocabulary {VOCAB}, batch "
        f"{arguments.batch} x {arguments.steps}; {arguments.threads} threads, medians of "
        f"{arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    results = {}
    for model in arguments.models:
        results[model] = measure(model, arguments)
        report(model, results[model], arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
