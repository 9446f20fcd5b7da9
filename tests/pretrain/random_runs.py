"""Run files drawn at random, most of them sound, and one rank of a run that exists alone.

torch's "fake" process groups answer every collective at once with whatever is in memory. So one
process can be any rank of any layout: models are built and steps are taken, without meaning.
"""

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain import layout as layouts
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines import make_engine
from pretrain.lr_schedule import learning_rate
from pretrain.trainer import train_step
from xlstm_mcore import hardware
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.sizes.parameters import count_parameters

# Keys that may have any size without taking memory.
_NUMBERS = (
    *("model.norm_eps", "model.cell_eps", "model.gate_soft_cap", "model.logit_soft_cap"),
    *("model.igate_bias_init", "model.rotary_base", "optimizer.lr", "optimizer.eps"),
    *("optimizer.weight_decay", "optimizer.clip_grad"),
)
_COUNTS = (
    *("run.seed", "run.steps", "model.chunk_size", "memory.logits_mib"),
    *("schedule.warmup_steps", "schedule.decay_steps", "schedule.cooldown_steps"),
)


def draw(seed: int) -> tuple[dict[str, Any], int, int]:
    """A run file by its seed, with the number of its processes and one of them.

    Sizes are drawn so that they often fit together, and then anything may be changed.
    """
    rng = random.Random(seed)
    often, rarely = 0.8, 0.15

    def some(*values: Any) -> Any:
        return rng.choice(values)

    def maybe(chance: float, **keys: Any) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if rng.random() < chance}

    letters = some("M", "m", "s", "*", "Mm", "Ms", "ms", "M*", "m*", "Mms*")
    tensor, context = some(1, 1, 1, 2, 2, 4), some(1, 1, 1, 1, 2, 3)
    pipeline = some(1, 1, 1, 2, 3)
    virtual = some(1, 2) if pipeline > 1 else 1
    stages = pipeline * virtual if rng.random() < 0.95 else some(1, 2)
    pattern = "|".join(
        "".join(rng.choice(letters) for _ in range(some(1, 1, 2))) for _ in range(stages)
    )
    heads = tensor * some(1, 1, 2, 3) * (context if rng.random() < often else 1)
    heads = heads if rng.random() < often else rng.randint(1, 8)
    hidden = min(64, heads * some(2, 4, 8, 12)) if rng.random() < 0.9 else rng.randint(1, 64)
    model = {
        "pattern": pattern,
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": tensor * rng.randint(1, 40) if rng.random() < often else rng.randint(1, 99),
        "tie_embeddings": some(True, False),
        "round_up_to": heads * some(1, 2, 4, 4, 4) if rng.random() < 0.9 else some(1, 3, 24, 64),
        **maybe(
            rarely,
            norm=some("rmsnorm", "layernorm"),
            norm_eps=some(1e-12, 1e-6, 10.0),
            cell_eps=some(0.0, 1e-6),
            qk_dim_factor=some(0.25, 0.5, 1.0, 0.3, 0.01),
            v_dim_factor=some(0.5, 1.0, 2.0, 0.7),
            ffn_dim_factor=some(0.1, 1.0, 2.667),
            gate_soft_cap=some(None, 15.0, 0.1),
            logit_soft_cap=some(None, 30.0),
            igate_bias_init=some(-10.0, 0.0, 50.0),
            up_dim_factor=some(0.2, 1.0, 1.5, 2.0),
            qkv_block_size=some(1, 2, 3, 4, 8, 16),
            conv_width=some(0, 1, 2, 4, 9),
            slstm_ffn_dim_factor=some(0.0, 0.1, 1.3, 2.0),
            residual=some(True, True, False),
            head_norm=some("layernorm", "rmsnorm", "none"),
            mlstm_gate=some("exp", "sigmoid"),
            mlstm_normalize=some(True, False),
            mlstm_input_gate=some(True, False),
            mlstm_forget_gate=some(True, False),
            slstm_forget_gate=some("sigmoid", "exp"),
            attention_heads=some(None, heads, 1, 2, 4, 8),
            attention_kv_heads=some(None, 1, 2, 4, tensor * context),
            attention_window=some(None, 1, 3, 100),
            attention_sinks=some(0, 0, 2),
            rotary_base=some(1.0, 10_000.0),
            dropout=some(0.0, 0.1, 0.99),
            chunk_size=some(None, 1, 3, 16, 64, 100),
            kernel_backend=some(None, "torch"),
        ),
    }
    sequence = tensor > 1 and some(True, False)
    split = context * (tensor if sequence else 1)
    length = split * rng.randint(1, 12) if rng.random() < 0.9 else rng.randint(1, 40)
    replicas, micro_batch = some(1, 1, 2, 3), some(1, 1, 2, 3)
    rows = micro_batch * replicas * (pipeline if virtual > 1 else 1)
    data = {
        "path": "unused",
        "seq_len": length,
        "global_batch": rows * some(1, 2) if rng.random() < 0.95 else rng.randint(1, 9),
        "micro_batch": micro_batch,
        **maybe(rarely, batch_ramp=[{"steps": some(1, 5), "global_batch": rows * some(1, 3)}]),
    }
    deepspeed = rng.random() < 0.15 and (context == 1 or rng.random() < rarely)
    engine = {
        "name": "deepspeed" if deepspeed else "megatron",
        "precision": some("fp32", "fp32", "bf16"),
        **maybe(
            often if deepspeed else 0.03,
            zero_stage=some(None, 1, 2, 3),
            offload=some("none", "none", "optimizer", "parameters"),
        ),
        **maybe(0.1, overlap_grad_reduce=some(None, True, False)),
        **maybe(0.05, overlap_param_gather=some(None, True, False)),
    }
    optimizer = maybe(
        rarely,
        name=some("adamw", "muon") if tensor == 1 and not deepspeed else "adamw",
        lr=some(1e-3, 1.0),
        betas=[some(0.0, 0.9), some(0.0, 0.95)],
        eps=some(1e-12, 1e-2),
        muon_momentum=some(0.0, 0.95),
        weight_decay=some(0.0, 0.1),
        decay={some("embedding", "norm", "recurrent", "bias"): some(True, False)},
        clip_grad=some(0.0, 1.0, 1e-6),
    )
    steps = some(1, 2, 10, 100_000)
    schedule = maybe(
        rarely,
        name=some("constant", "linear", "cosine", "exponential", "wsd"),
        warmup_steps=rng.randint(0, steps),
        decay_steps=some(None, 1, steps),
        cooldown_steps=rng.randint(0, steps),
        cooldown_shape=some("linear", "1-sqrt", "cosine", "exponential"),
        cooldown_min_lr_ratio=some(0.0, 0.1, 1.0),
        min_lr_ratio=some(0.0, 0.1, 1.0),
    )
    memory = maybe(
        0.3,
        recompute=some("none", "selective", "full"),
        recompute_full_blocks=some("", *letters),
        logits_mib=some(0, 512),
    )
    sizes = {
        "tensor": tensor,
        "sequence": sequence,
        "pipeline": pipeline,
        "virtual": virtual,
        "context": context,
    }
    run = {"dir": "unused", "steps": steps, "seed": seed}
    raw = {"run": run, "model": model, "data": data, "layout": sizes, "memory": memory}
    raw |= {"engine": engine, "optimizer": optimizer, "schedule": schedule}
    if rng.random() < 0.1:
        section, key = rng.choice(_NUMBERS).split(".")
        raw[section][key] = some(1e-300, 1e29, 1e38, 1e300)
    if rng.random() < 0.05:
        section, key = rng.choice(_COUNTS).split(".")
        raw[section][key] = some(10**15, 2**31, 2**63, 2**80)
    processes = tensor * pipeline * context * replicas
    # DeepSpeed's stage 3 compares what rank 0 says with what each of them has.
    return raw, processes, 0 if deepspeed else rng.randrange(processes)


@contextlib.contextmanager
def alone(rank: int, processes: int) -> Iterator[None]:
    """This process is one rank of a run whose others are not there."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    with (
        mock.patch.dict(os.environ, {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}),
        mock.patch.object(hardware, "process_group_options", lambda: {"backend": "fake"}),
        mock.patch.object(layouts, "meet", lambda *place: FakeStore()),
        mock.patch.object(cpu_runtime, "pipeline_settings", lambda *_: _GLOO),
        mock.patch.object(sys, "excepthook", sys.excepthook),  # torch's names the rank
    ):
        layouts.leave()  # the group of one that an earlier test in this process may have joined
        try:
            yield
        finally:
            layouts.leave()


_GLOO = cpu_runtime.pipeline_settings("gloo")


def first_step(config: RunConfig, rank: int, processes: int) -> None:
    """Build this rank's part of a run, take its first step and evaluate one micro-batch."""
    with alone(rank, processes):
        layout = layouts.start(config)
        engine = make_engine(config, layout)
        try:
            if processes == 1:
                assert engine.num_parameters == count_parameters(config.model)["total"]
            rows = config.data.ramp.size(0) // layout.dp_size
            batches = _batch(config, rows).split(config.data.micro_batch)
            lr, steps = config.optimizer.lr, config.run.steps
            rates = [
                learning_rate(step, peak=lr, schedule=config.schedule, steps=steps)
                for step in (0, steps // 2, steps - 1)
            ]
            train_step(engine, batches, rates[0])
            engine.evaluate(batches[:1])
        finally:
            engine.close()


def _batch(config: RunConfig, rows: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    shape = (rows, config.data.seq_len)
    tokens = torch.randint(0, config.model.vocab_size, (rows, shape[1] + 1), generator=rng)
    boundaries = torch.rand(shape, generator=rng) < 0.2
    sources = torch.zeros(rows, 0, dtype=torch.float64)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(shape), boundaries, sources)
