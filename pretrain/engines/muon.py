"""Muon for the matrices of hidden layers, AdamW for everything else, under Megatron's schedules.

Muon (Jordan et al. 2024) orthogonalises the momentum of a whole matrix, so a matrix cannot be cut:
every data-parallel rank keeps the whole optimizer state of its pipeline stage (ZeRO stage 0), and
tensor parallelism is refused. What is a matrix is decided by global tensors, not by parameters:
q, k, v and the output gate lie in one parameter and are orthogonalised one by one. The update is
scaled to the root mean square of AdamW's, so that one learning rate serves both (Liu et al.,
arXiv 2502.16982).

torch's own Muon does the arithmetic. megatron-core's needs the package emerging-optimizers, which
the tested stacks do not have.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.engines.base import StepResult
from pretrain.engines.megatron import MegatronEngine
from pretrain.engines.state import optimizer_prefix
from xlstm_mcore.megatron import compat
from xlstm_mcore.parameters.decay import is_hidden_matrix
from xlstm_mcore.parameters.slices import ParameterSlice, named_slices


@dataclass(frozen=True)
class _Entry:
    """One global tensor of this rank: its place in a parameter, and its fp32 master weight."""

    parameter: Tensor
    part: ParameterSlice
    master: Tensor
    owned: bool


class MuonEngine(MegatronEngine):
    """See :class:`pretrain.engines.base.Engine`."""

    distributed_optimizer = False

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate ``lr`` and clear the gradients."""
        for entry in self._entries:
            entry.master.grad = entry.part.local(entry.parameter.main_grad).float().contiguous()
        norm = self._gradient_norm()
        finite = math.isfinite(norm)
        if finite:
            limit = self.config.optimizer.clip_grad
            if 0 < limit < norm:
                torch._foreach_mul_([e.master.grad for e in self._entries], limit / (norm + 1e-6))
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            self._copy_masters_to_weights()
        for entry in self._entries:
            entry.master.grad = None
        self._clear_gradients()
        return StepResult(grad_norm=norm, skipped=not finite)

    def sharded_state(self) -> list[TensorSlice]:
        """The rectangles this rank saves: of equal replicas the first one saves."""
        if self.layout.groups.dp_cp.rank() > 0:
            return []
        return super().sharded_state()

    def load_sharded_state(self, load: Callable[[list[TensorSlice]], None], step: int) -> None:
        """Fill weights, fp32 masters, Muon's momentum and Adam's moments."""
        with torch.no_grad():
            load(self._weights() + [chunk for _, chunk in self._optimizer_slices()])
        compat.set_adam_step(self._adam, step)
        self._clear_gradients()

    def _make_optimizer(self) -> None:
        options = self.config.optimizer
        self._entries = [
            _Entry(
                parameter,
                part,
                part.local(parameter.detach()).float().clone().requires_grad_(),
                self._is_owner(parameter),
            )
            for model in self.models
            for _, parameter, slices in named_slices(model)
            for part in slices
        ]

        def groups(muon: bool) -> list[dict[str, Any]]:
            return [
                {
                    "params": [
                        e.master
                        for e in self._entries
                        if is_hidden_matrix(e.part.name, e.part.global_shape) == muon
                        and e.parameter.no_weight_decay == without
                    ],
                    "weight_decay": 0.0 if without else options.weight_decay,
                }
                for without in (False, True)
            ]

        self._adam = torch.optim.AdamW(
            groups(False), lr=options.lr, betas=options.betas, eps=options.eps
        )
        self._muon = torch.optim.Muon(
            groups(True),
            lr=options.lr,
            momentum=options.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._optimizers = (self._muon, self._adam)
        compat.create_adam_state(self._adam)
        for group in self._muon.param_groups:
            for master in group["params"]:
                self._muon.state[master]["momentum_buffer"] = torch.zeros_like(master)

    def _gradient_norm(self) -> float:
        """2-norm of the whole gradient; replicated and tied tensors count once."""
        total = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        for entry in self._entries:
            if entry.owned:
                total += entry.master.grad.square().sum()
        torch.distributed.all_reduce(total, group=self.layout.groups.mp)
        return total.sqrt().item()

    @torch.no_grad()
    def _copy_masters_to_weights(self) -> None:
        for entry in self._entries:
            entry.part.local(entry.parameter).copy_(entry.master)

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Masters with Muon's momentum or Adam's moments, by global tensor."""
        for entry in self._entries:
            part, master = entry.part, entry.master
            state = {"param": master.detach()}
            if master in self._muon.state:
                state["momentum"] = self._muon.state[master]["momentum_buffer"]
            else:
                state |= {key: self._adam.state[master][key] for key in ("exp_avg", "exp_avg_sq")}
            for key, tensor in state.items():
                name = optimizer_prefix(key) + part.name
                yield (
                    entry.parameter,
                    TensorSlice(name, part.global_shape, part.global_offset, tensor),
                )
