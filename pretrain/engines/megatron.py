"""The Megatron engine: Megatron's schedules, DDP and DistributedOptimizer around XLSTMModel."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pretrain.checkpoint import Chunk
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.layout import Layout
from xlstm_mcore import cpu_runtime, mcore_compat
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.init import decays
from xlstm_mcore.pieces import Piece, named_pieces, rectangles

from .base import LossSum, StepResult

OPTIMIZER_STATE = ("param", "exp_avg", "exp_avg_sq")


class MegatronEngine:
    """See :class:`pretrain.engines.base.Engine`.

    Args:
        config: the run.
        layout: the process layout the run was started on.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.model_config = make_config(
            config.model.model_dump(),
            precision=config.engine.precision,
            tensor=config.layout.tensor,
            sequence=config.layout.sequence,
            pipeline=config.layout.pipeline,
            virtual=config.layout.virtual,
            backend=layout.backend,
        )
        models = build_model(self.model_config, layout.groups, config.run.seed)
        for model in models:
            for _, parameter, pieces in named_pieces(model):
                parameter.no_weight_decay = not decays(pieces[0].name)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
        )
        self.chunks = [
            DistributedDataParallel(
                self.model_config,
                ddp_config,
                model,
                disable_bucketing=number > 0,
                pg_collection=layout.groups,
            )
            for number, model in enumerate(models)
        ]
        self.optimizer = self._make_optimizer()
        self.model_config.finalize_model_grads_func = finalize_model_grads
        self.model_config.grad_scale_func = self.optimizer.scale_loss
        self._forward_backward = get_forward_backward_func()
        self._clear_gradients()
        self.num_parameters = self._count_parameters()

    def forward_backward(self, batches: list[Batch]) -> LossSum:
        """Loss of one global batch; gradients stay in the buffers until :meth:`step`."""
        for chunk in self.chunks:
            chunk.train()
        return self._run(batches, forward_only=False)

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate ``lr`` and clear the gradients.

        Megatron's own ``step`` lets a gradient norm of NaN through into the weights (it only
        compares the clipping factor with 1), so the norm is judged here before anything changes.
        """
        options = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(norm)
        if finite:
            if options.clip_grad > 0:
                for optimizer in self.optimizer.chained_optimizers:
                    parameters = optimizer.get_parameters()
                    if parameters:
                        clip_grads.clip_grad_by_total_norm_fp32(parameters, options.clip_grad, norm)
            self.optimizer.step_with_ready_grads()
        self._clear_gradients()
        return StepResult(grad_norm=norm, skipped=not finite)

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Loss over this replica's batches without gradients, summed over all replicas."""
        for chunk in self.chunks:
            chunk.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                loss = self._run([batch], forward_only=True)
                total, tokens = total + loss.total, tokens + loss.tokens
        return LossSum(total, tokens)

    def sharded_state(self) -> list[Chunk]:
        """The rectangles this rank saves: every element of the state lies on exactly one rank."""
        chunks = []
        if self.layout.groups.dp_cp.rank() == 0:
            for model in self.chunks:
                for _, parameter, pieces in named_pieces(model.module):
                    if self._is_owner(parameter):
                        chunks += _weight_chunks(parameter, pieces)
        for parameter, chunk in self._optimizer_chunks():
            if self._is_owner(parameter):
                chunks.append(chunk)
        return chunks

    def load_sharded_state(self, load: Callable[[list[Chunk]], None], step: int) -> None:
        """Fill weights, fp32 masters and moments.

        Args:
            load: copies a checkpoint's values into the chunks it is given.
            step: optimizer steps taken so far, for Adam's bias correction.
        """
        chunks = []
        for model in self.chunks:
            for _, parameter, pieces in named_pieces(model.module):
                chunks += _weight_chunks(parameter, pieces)
        chunks += [chunk for _, chunk in self._optimizer_chunks()]
        with torch.no_grad():
            load(chunks)
        for optimizer in self.optimizer.chained_optimizers:
            mcore_compat.set_adam_step(optimizer.optimizer, step)
        self._clear_gradients()

    def _make_optimizer(self) -> Any:
        options = self.config.optimizer
        cpu_runtime.activate()
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.betas[0],
                adam_beta2=options.betas[1],
                adam_eps=options.eps,
                clip_grad=options.clip_grad,
                bf16=self.config.engine.precision == "bf16",
                params_dtype=self.model_config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.chunks,
            config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
            pg_collection=self.layout.groups,
        )
        for part in optimizer.chained_optimizers:
            mcore_compat.create_adam_state(part.optimizer)
        return optimizer

    def _run(self, batches: list[Batch], forward_only: bool) -> LossSum:
        iterators: Any = [iter(batches) for _ in self.chunks]
        losses = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.data.seq_len,
            micro_batch_size=self.config.data.micro_batch,
            forward_only=forward_only,
            pg_collection=None,
        )
        # Only the last stage has losses, the same ones on all its tensor-parallel ranks.
        total = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        for loss in losses:
            total += loss["sums"]
        groups = self.layout.groups
        torch.distributed.all_reduce(total, group=groups.dp_cp)
        torch.distributed.all_reduce(total, group=groups.pp)
        return LossSum(total[0].item(), int(total[1].item()))

    def _forward_step(
        self, iterator: Iterator[Batch], model: DistributedDataParallel
    ) -> tuple[Tensor, Callable]:
        batch = next(iterator).to(self.layout.device)
        output = model(batch.tokens, batch.boundaries, batch.labels)

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            """Summed loss, number of tokens, and both for the log (Megatron's convention)."""
            total = (losses * batch.loss_mask).sum()
            tokens = batch.loss_mask.sum()
            sums = torch.stack((total.detach(), tokens)).double()
            return total, tokens.int(), {"sums": sums}

        return output, loss_function

    def _clear_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _count_parameters(self) -> int:
        """Parameters of the whole model, counted from what all ranks hold."""
        mine = sum(
            parameter.numel()
            for model in self.chunks
            for _, parameter, _ in named_pieces(model.module)
            if self._is_owner(parameter)
        )
        count = torch.tensor(mine, dtype=torch.int64, device=self.layout.device)
        torch.distributed.all_reduce(count)
        return count.item() // self.layout.groups.dp_cp.size()

    def _is_owner(self, parameter: Tensor) -> bool:
        """Whether this rank's copy is the one that counts among tensor-parallel and tied ones."""
        if getattr(parameter, "shared", False):
            return False  # the last stage's copy of a tied embedding
        return parameter.tensor_model_parallel or self.layout.groups.tp.rank() == 0

    def _optimizer_chunks(self) -> Iterator[tuple[Tensor, Chunk]]:
        """Rectangles of fp32 masters and moments that this rank's optimizer shard holds."""
        for optimizer in self.optimizer.chained_optimizers:
            for parameter, start, end in mcore_compat.shard_ranges(optimizer):
                state = mcore_compat.adam_state(optimizer, parameter)
                for key in OPTIMIZER_STATE:
                    for piece, offset, view in _rectangles_of_shard(
                        parameter, state[key].detach(), start, end
                    ):
                        yield (
                            parameter,
                            Chunk(
                                f"optimizer.state.{key}.{piece.name}",
                                piece.global_shape,
                                offset,
                                view,
                            ),
                        )


def _weight_chunks(parameter: Tensor, pieces: Iterable[Piece]) -> list[Chunk]:
    return [
        Chunk(piece.name, piece.global_shape, piece.global_offset, piece.local(parameter.detach()))
        for piece in pieces
    ]


def _rectangles_of_shard(
    parameter: Tensor, shard: Tensor, start: int, end: int
) -> Iterator[tuple[Piece, tuple[int, ...], Tensor]]:
    """Cut a flat shard ``[start, end)`` of a parameter along rectangles and pieces.

    Yields:
        The piece, the offset in its canonical tensor, and the view of ``shard`` that lies there.
    """
    for offset, shape, flat in rectangles(parameter.shape, start, end):
        block = shard[flat - start : flat - start + math.prod(shape)].view(shape)
        for piece in parameter.pieces:
            low = [max(a, b) for a, b in zip(offset, piece.local_offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, piece.local_offset, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            place = tuple(
                g + a - b
                for g, a, b in zip(piece.global_offset, low, piece.local_offset, strict=True)
            )
            yield piece, place, block[inside]
