"""What `check` prints first: the facts of a run that follow from its config alone."""

from collections import Counter
from pathlib import Path

from pretrain.config import RunConfig, data_parallel_size, filled_rows, micro_batches, support
from pretrain.config.checks.kernels import gpus_for_persistent, on_pytorch
from pretrain.rehearsal.gpus import GPUS
from pretrain.supervision.progress_file import read_progress
from xlstm_io.terminal import counted, size_of_model
from xlstm_mcore.pattern import LETTERS, parse_pattern
from xlstm_mcore.sizes.flops import forward_flops, state_bytes, training_flops
from xlstm_mcore.sizes.parameters import count_parameters


def _parameters(count: int) -> str:
    return f"{count:,} ({size_of_model(count)})"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.2f} kB"


def _engine(config: RunConfig) -> str:
    engine = config.engine
    words = [engine.name, config.optimizer.name, f"ZeRO stage {support.zero_stage(config)}"]
    if engine.offload != "none":
        words.append(f"offload of {engine.offload}")
    on_gpus = zip(support.OVERLAP_AXES, support.overlaps(config, "nccl"), strict=False)
    overlapped = [axis for axis, wanted in on_gpus if wanted]
    if overlapped:
        words.append(f"{' and '.join(overlapped)} with NCCL")
    if engine.grad_reduce != "fp32":
        words.append(f"gradients summed in {engine.grad_reduce}")
    return ", ".join([*words, engine.precision])


def _slstm_form(config: RunConfig) -> list[str]:
    """Which GPUs hold the persistent sLSTM that the run asks for."""
    if config.memory.slstm_form != "persistent":
        return []
    fits = gpus_for_persistent(config)
    lost = [name for name in GPUS if name not in fits]
    but = f"; not {' or '.join(lost)}" if lost else ""
    return [f"sLSTM             persistent, fits {', '.join(fits)}{but}"]


def _grace(config: RunConfig) -> list[str]:
    """Whether a step and a save fit between a stop signal and the kill that follows."""
    grace, progress = config.run.grace_seconds, read_progress(Path(config.run.dir))
    if grace is None:
        return []
    label = f"grace             {grace:g} s"
    if progress is None or progress.step_seconds is None or progress.save_seconds is None:
        return [f"{label}; whether a step and a save fit is known once the run has saved"]
    needed = progress.step_seconds + progress.save_seconds
    took = f"a step took {progress.step_seconds:.1f} s and a save {progress.save_seconds:.1f} s"
    if needed <= grace:
        return [f"{label}: {took}"]
    return [
        f"{label}: {took}, so a stop would be cut by the kill (run.grace_seconds={grace:g}); let "
        "the scheduler send its signal earlier, or give a faster checkpoint.dir"
    ]


def _unwatched(config: RunConfig) -> list[str]:
    """What nobody notices, where nobody watches."""
    if config.guard.hang_timeout != 0:
        return []
    return [
        "watchdog          off (guard.hang_timeout=0): nobody notices a rank or a worker of the "
        "loader that stands still, and the run waits for it"
    ]


def _model(config: RunConfig) -> list[str]:
    """Parameters, and the work and memory of a token."""
    model, seq_len = config.model, config.data.seq_len
    counts, letters = count_parameters(model), parse_pattern(model.pattern).letters
    head = "the embedding, tied" if model.tie_embeddings else _parameters(counts["head"])
    lines = [
        f"parameters        {_parameters(counts['total'])}",
        f"  embedding       {_parameters(counts['embedding'])}",
        f"  output layer    {head}",
        f"  {len(letters)} blocks",
    ]
    for letter, number in Counter(letters).items():
        each = _parameters(counts["layers"][letters.index(letter)])
        lines.append(f"    {number:3} x {letter}       {each} each: {LETTERS[letter]}")
    forward, training = forward_flops(model, seq_len), training_flops(model, seq_len)
    shares = ", ".join(
        f"{name.replace('_', '-')} {count / sum(forward.values()):.1%}"
        for name, count in forward.items()
        if count
    )
    size = 2 if config.engine.precision == "bf16" else 4
    state = state_bytes(model, size, seq_len)
    grows = state != state_bytes(model, size)
    return [
        *lines,
        f"training FLOPs    {training:.3e} per token, {training * config.tokens_per_step:.3e} "
        f"per step",
        f"  forward         {shares}",
        f"generation state  {_bytes(state)} per sequence"
        f"{f' of {seq_len} tokens' if grows else ', whatever its length'}",
    ]


def _batch(config: RunConfig, world_size: int | None) -> list[str]:
    """Tokens of a step and of the run, and which processes compute them."""
    data, layout = config.data, config.layout
    replica = layout.tensor * layout.pipeline * layout.context
    lines = [
        f"tokens per step   {config.tokens_per_step:,} "
        f"({data.global_batch} rows of {data.seq_len})",
        f"tokens in the run {data.ramp.samples(config.run.steps) * data.seq_len:,} "
        f"({config.run.steps:,} steps)",
        f"one replica       {counted(replica, 'process', 'processes')}: tensor {layout.tensor}"
        f"{' with sequence parallel' if layout.sequence else ''}, pipeline {layout.pipeline}"
        f" (virtual {layout.virtual}), context {layout.context}",
    ]
    if world_size is None:
        return lines
    replicas = data_parallel_size(config, world_size)
    micro = micro_batches(config, replicas)
    lines.append(
        f"on {world_size} processes    {counted(replicas, 'data parallel replica')}, "
        f"{counted(micro, 'micro-batch', 'micro-batches')} of "
        f"{counted(data.micro_batch, 'row')} each per step"
    )
    cost = filled_rows(config, replicas)
    return [*lines, *([f"filled batch      {cost}"] if cost else [])]


def describe_run(config: RunConfig, world_size: int | None = None) -> str:
    """Model, batch and layout in a few lines; with `world_size`, how the processes are used."""
    return "\n".join(
        [
            *_model(config),
            *_batch(config, world_size),
            f"engine            {_engine(config)}",
            f"run folder        {config.run.dir}",
            *_slstm_form(config),
            *(f"slow              {one}" for one in on_pytorch(config)),
            *_grace(config),
            *_unwatched(config),
            f"data              {', '.join(s.path for s in config.data.mixture)}",
        ]
    )
