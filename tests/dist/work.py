"""What distributed tests run on every rank: tiny models, synthetic batches, states to compare."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from pretrain import layout as layouts
from pretrain.checkpoint import TensorSlice, load_checkpoint, save_checkpoint
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines import make_engine as engine_of
from pretrain.engines.base import Engine
from pretrain.self_test.batches import random_batches, share_of
from pretrain.self_test.weights import LEAST_IGATE_BIAS, noise
from pretrain.trainer import train_step
from xlstm_io.tokenizer import DocumentIds
from xlstm_mcore import build
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.generation.settings import Sampling
from xlstm_mcore.parameters.slices import is_shared, named_slices

# The per-head norm of a first token's tiny output divides by it: with the usual eps of 1e-6
# rounding errors of 1e-7 grow by orders of magnitude within three steps, in one process too. With
# 1e-2 two mLSTM blocks still make 1e-4 of them, with this 1e-6.
SMOOTH = {"norm_eps": 1e-1}

MODELS: dict[str, dict[str, Any]] = {
    "large": {"pattern": "MM", "hidden_size": 64, "num_heads": 4, **SMOOTH},
    "large_deep": {"pattern": "MMMM", "hidden_size": 64, "num_heads": 4, **SMOOTH},
    "classic": {
        "pattern": "msmm",
        "hidden_size": 64,
        "num_heads": 4,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "logit_soft_cap": None,
    },
    "mixed": {"pattern": "Msms", "hidden_size": 64, "num_heads": 4, **SMOOTH},
    "baselines": {
        "pattern": "dl",
        "hidden_size": 64,
        "num_heads": 4,
        "ssm_head_dim": 16,
        "ssm_state_dim": 16,
        **SMOOTH,
    },
    "deep": {"pattern": "MsMmMsMm", "hidden_size": 64, "num_heads": 4, **SMOOTH},
    "hybrid": {
        "pattern": "M*",
        "hidden_size": 64,
        "num_heads": 4,
        "attention_heads": 8,
        "attention_kv_heads": 2,
        **SMOOTH,
    },
}


def run_config(model: str, **changes: Any) -> RunConfig:
    """A run of a tiny model; ``changes`` are dotted keys such as ``layout__tensor=2``."""
    raw: dict[str, Any] = {
        "run": {"dir": "unused", "steps": 10, "seed": 3},
        "model": {"vocab_size": 96, **MODELS[model]},
        "data": {"path": "unused", "seq_len": 24, "global_batch": 4, "micro_batch": 1},
        "layout": {},
        "memory": {},
        "engine": {},
        # A large eps: Adam would otherwise turn the sign of a rounding error into a full update.
        "optimizer": {"lr": 1e-2, "eps": 1e-2, "clip_grad": 1.0},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    cuts = raw["layout"].get("pipeline", 1) * raw["layout"].get("virtual", 1)
    letters = raw["model"]["pattern"]
    size = len(letters) // cuts
    raw["model"]["pattern"] = "|".join(letters[i : i + size] for i in range(0, len(letters), size))
    return RunConfig.model_validate(raw)


def perturb(models: list[torch.nn.Module]) -> None:
    """Move weights off their special initial values, by global name."""
    with torch.no_grad():
        for model in models:
            for _, parameter, slices in named_slices(model):
                for part in slices:
                    added = noise(part.name, part.global_shape)
                    part.local(parameter).add_(part.of_global(added))
                    if part.name.endswith("igate.bias"):
                        part.local(parameter).clamp_(min=LEAST_IGATE_BIAS)


def make_engine(config: RunConfig, **options: Any) -> tuple[Engine, layouts.Layout]:
    """The engine on this rank's layout, with perturbed weights where it has initial ones."""
    layout = layouts.start(config)

    original = build.initialize

    def initialize(part, *args):
        original(part, *args)
        perturb([part])

    with mock.patch.object(build, "initialize", initialize):
        return engine_of(config, layout, **options), layout


def train_steps(
    engine: Engine, layout: layouts.Layout, config: RunConfig, first: int, last: int
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps ``first`` to ``last``, this replica's share of each batch."""
    results = []
    for step in range(first, last):
        result = train_step(engine, share_of(config, layout, step), config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    return results


def train(config: RunConfig, steps: int = 3) -> tuple[list[tuple[float, float]], list[TensorSlice]]:
    """Train a few steps; losses and gradient norms, and the slices this rank would save."""
    engine, layout = make_engine(config)
    results = train_steps(engine, layout, config, 0, steps)
    return results, [
        TensorSlice(c.name, c.global_shape, c.global_offset, c.tensor.detach().clone())
        for c in engine.sharded_state()
    ]


def train_and_save(config: RunConfig, root: str, steps: int, more: int) -> Any:
    """Train ``steps``, save, train ``more``; results of the latter."""
    engine, layout = make_engine(config)
    train_steps(engine, layout, config, 0, steps)
    save_checkpoint(root, engine.sharded_state(), {}, config.model_dump(mode="json"), step=steps)
    results = train_steps(engine, layout, config, steps, steps + more)
    return results, engine.sharded_state()


def resume(config: RunConfig, path: str, steps: int, more: int) -> Any:
    """Load a checkpoint of ``steps`` steps on this layout and train ``more``."""
    engine, layout = make_engine(config, initial_values=False)
    engine.load_sharded_state(lambda chunks: load_checkpoint(path, chunks), steps)
    results = train_steps(engine, layout, config, steps, steps + more)
    return results, engine.sharded_state()


def assemble(parts: list[list[TensorSlice]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' slices; every element must come from exactly one."""
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for chunk in (chunk for part in parts for chunk in part):
        value = tensors.setdefault(chunk.name, torch.zeros(chunk.global_shape, dtype=torch.float64))
        count = counts.setdefault(chunk.name, torch.zeros(chunk.global_shape))
        place = tuple(
            slice(o, o + n) for o, n in zip(chunk.global_offset, chunk.tensor.shape, strict=True)
        )
        value[place] += chunk.tensor.double()
        count[place] += 1
    for name, count in counts.items():
        assert torch.all(count == 1), f"{name}: elements saved {count.unique().tolist()} times"
    return tensors


def fp64_gradients(config: RunConfig) -> tuple[float, list[TensorSlice]]:
    """Loss and gradient of one global batch in fp64, through Megatron's schedule and DDP.

    Only what this rank counts for: one copy of replicated and of tied parameters.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    layout = layouts.start(config)
    model_config = make_config(config.model, layout=config.layout, memory=config.memory)
    model_config.params_dtype = model_config.pipeline_dtype = torch.float64
    model_config.finalize_model_grads_func = finalize_model_grads
    chunks = build_model(model_config, layout.groups, config.run.seed)
    perturb(chunks)
    models = [
        DistributedDataParallel(
            model_config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=False),
            chunk,
            pg_collection=layout.groups,
        )
        for chunk in chunks
    ]
    batches = share_of(config, layout, 0)

    def forward_step(iterator, model):
        batch = next(iterator).context_slice(layout.groups.cp.rank(), layout.groups.cp.size())
        output = model(batch.tokens, batch.boundaries, batch.labels)

        def loss_function(losses):
            total = (losses * batch.loss_mask).sum()
            return total, batch.loss_mask.sum().int(), {"total": total.detach()}

        return output, loss_function

    several = len(models) > 1
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in models] if several else iter(batches),
        model=models if several else models[0],
        num_microbatches=len(batches),
        seq_length=config.data.seq_len,
        micro_batch_size=config.data.micro_batch,
        forward_only=False,
    )
    last_stage = sum(result["total"].item() for result in results)
    parts = layout.groups
    loss = torch.tensor(last_stage, dtype=torch.float64)
    torch.distributed.all_reduce(loss, group=parts.dp_cp)
    torch.distributed.all_reduce(loss, group=parts.pp)
    mine = []
    for model in models:
        for _, parameter, slices in named_slices(model.module):
            counted = parameter.tensor_model_parallel or parts.tp.rank() == 0
            if parts.dp_cp.rank() == 0 and counted and not is_shared(parameter):
                assert parameter.main_grad.dtype == torch.float64
                mine += [
                    TensorSlice(
                        p.name, p.global_shape, p.global_offset, p.local(parameter.main_grad)
                    )
                    for p in slices
                ]
    return loss.item(), mine


class PlainTokenizer:
    """Stands in for a tokenizer: the ids of a prompt are its numbers, and so is the text of ids."""

    vocab_size = 96
    eos_id = -1

    @staticmethod
    def prompt_ids(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    @staticmethod
    def document_ids() -> DocumentIds:
        return DocumentIds(bos=0, eos=-1, pad=-1)

    @staticmethod
    def decode(ids) -> str:
        return "".join(f"{token} " for token in ids)


def generate_tokens(path: str, prompts: list[str], sampling: Sampling) -> tuple[list, Any]:
    """Continue prompts with the model of a checkpoint, tensor parallel over this call's ranks."""
    from xlstm_mcore.generation.generate import generate
    from xlstm_mcore.inference import model_logits, open_model, prepare_for_tokens

    model = open_model(path)
    prepare_for_tokens(model)  # as `load_model` does
    tokenizer: Any = PlainTokenizer()
    logits = model_logits(model, torch.tensor([tokenizer.prompt_ids(prompts[0])]))
    return [one.tokens for one in generate(model, tokenizer, prompts, sampling)], logits


def refused_split(path: str) -> str:
    """The message of a checkpoint whose heads do not split over this call's ranks."""
    from pretrain.checkpoint import resolve
    from pretrain.commands.after_run.generate import check_split
    from xlstm_io.errors import ConfigError

    try:
        check_split(resolve(path))
    except ConfigError as error:
        return str(error)
    return ""


def _first_moments(engine: Engine) -> list[TensorSlice]:
    return [c for c in engine.sharded_state() if c.name.startswith("optimizer.state.exp_avg.")]


def first_moments(config: RunConfig) -> list[TensorSlice]:
    """Adam's first moment after one step: without clipping the gradient times 1 - beta1."""
    engine, layout = make_engine(config)
    mine = random_batches(config, 0)[layout.dp_rank :: layout.dp_size]
    assert train_step(engine, mine, config.optimizer.lr).accepted
    return _first_moments(engine)


def first_moments_two_ways(config: RunConfig) -> tuple[list[TensorSlice], list[TensorSlice]]:
    """`first_moments` with every token counted, and the same from many steps.

    The same engine computes both, since on some processors a bf16 product depends on where its
    operands lie in memory. When the number of tokens is a power of two, scaling the loss before the
    backward pass or the gradient after it rounds alike in bf16.

    Returns:
        The moments of one step of all micro-batches, and those of steps of as few as the pipeline
        takes, added up here in fp64. Each step starts from a moment of zero and changes no weight.
    """
    engine, layout = make_engine(config)
    batches = list(map(unmasked, random_batches(config, 0)))[layout.dp_rank :: layout.dp_size]
    moments = _first_moments(engine)
    totals = [torch.zeros_like(chunk.tensor, dtype=torch.float64) for chunk in moments]
    few = config.layout.pipeline
    for start in range(0, len(batches), few):
        torch._foreach_zero_([chunk.tensor for chunk in moments])
        assert train_step(engine, batches[start : start + few], 0.0).accepted
        for total, chunk in zip(totals, moments, strict=True):
            total += chunk.tensor * few / len(batches)
    by_few = [replace(c, tensor=total) for c, total in zip(moments, totals, strict=True)]
    torch._foreach_zero_([chunk.tensor for chunk in moments])
    assert train_step(engine, batches, 0.0).accepted
    return moments, by_few


def unmasked(batch: Batch) -> Batch:
    """The batch with every token counted."""
    return replace(batch, loss_mask=torch.ones_like(batch.loss_mask))


def train_around_a_bad_step(config: RunConfig) -> tuple[list[bool], bool, Any]:
    """Two steps with one of infinite gradients between them, on one rank only.

    Returns:
        Whether each step was skipped, whether the bad one left the state as it was, and what
        :func:`train` returns.
    """
    engine, layout = make_engine(config)
    first = train_steps(engine, layout, config, 0, 1)
    before = [chunk.tensor.clone() for chunk in engine.sharded_state()]
    parameter = next(engine.models[-1].parameters())
    factor = float("inf") if layout.rank == layout.world_size - 1 else 1.0
    handle = parameter.register_hook(lambda gradient: gradient * factor)
    batches = random_batches(config, 7)[layout.dp_rank :: layout.dp_size]
    bad = train_step(engine, batches, config.optimizer.lr)
    handle.remove()
    after = [chunk.tensor for chunk in engine.sharded_state()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    last = train_steps(engine, layout, config, 1, 2)
    return [not bad.accepted, not math.isfinite(bad.grad_norm)], same, (first + last)
