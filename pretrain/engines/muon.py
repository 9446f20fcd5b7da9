"""Muon for the matrices of hidden layers, AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises the momentum of a whole matrix, so a matrix cannot be cut.
Each parameter of a pipeline stage belongs to one of its data-parallel ranks, which keeps the
optimizer's state of it, updates it and sends it to the others. Gradients are not shared out (ZeRO
stage 0). With tensor parallelism that is one data-parallel rank of each tensor-parallel rank, and
one of these owns the whole matrix: it gathers the slices of the gradient, and sends back those of
the new weight. Global tensors decide what is a matrix, not parameters: q, k, v and the output gate
lie in one parameter and are orthogonalised one by one. The update is scaled to the root mean square
of AdamW's, so that one learning rate serves both (Liu et al., arXiv 2502.16982).

torch's own Muon does the arithmetic. megatron-core's needs the package emerging-optimizers, which
the tested stacks do not have.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig
from pretrain.engines.adamw import mask_on_device
from pretrain.engines.gradients import clip_gradients, sum_of_squares
from pretrain.engines.state import (
    is_owner,
    optimizer_prefix,
    send_from_owners,
    shared_out,
    with_owners,
)
from pretrain.engines.verdict import Verdict
from pretrain.layout import Layout
from xlstm_mcore.megatron import compat
from xlstm_mcore.parameters.decay import is_hidden_matrix
from xlstm_mcore.parameters.slices import ParameterSlice, named_slices


@dataclass(frozen=True)
class _Master:
    """The fp32 master weight of one global tensor, or of this rank's slice of it.

    Attributes:
        parameter: the local parameter that it lies in.
        part: where in the parameter and in the global tensor.
        offset: where the weight lies in the global tensor.
        weight: the master weight.
        owned: whether this rank's copy counts among tensor-parallel and tied ones.
    """

    parameter: Tensor
    part: ParameterSlice
    offset: tuple[int, ...]
    weight: Tensor
    owned: bool

    @property
    def is_matrix(self) -> bool:
        """Whether Muon updates it."""
        return _is_matrix(self.part)


def _is_matrix(part: ParameterSlice) -> bool:
    return is_hidden_matrix(part.name, part.global_shape)


class _SplitMatrix:
    """A matrix whose slices lie on all tensor-parallel ranks, and whose master weight is on one.

    Args:
        parameter: the local parameter with this rank's slice.
        part: where the slice lies.
        owner: the rank in `group` that has the master weight.
        group: the tensor-parallel group.
    """

    def __init__(
        self, parameter: Tensor, part: ParameterSlice, owner: int, group: dist.ProcessGroup
    ) -> None:
        self.parameter, self.part, self.owner, self._group = parameter, part, owner, group

    def gather(self, slice_: Tensor) -> Tensor | None:
        """The whole tensor, of every rank's slice; on its owner, None elsewhere.

        Args:
            slice_: this rank's.
        """
        slice_ = slice_.contiguous()
        mine = self._group.rank() == self.owner
        whole = slice_.new_empty(self.part.global_shape) if mine else None
        slices = None if whole is None else [torch.empty_like(slice_) for _ in self._places()]
        dist.gather(slice_, slices, group=self._group, group_dst=self.owner)
        if whole is not None and slices is not None:
            for place, one in zip(self._places(), slices, strict=True):
                whole[place] = one
        return whole

    def scatter(self, whole: Tensor | None) -> None:
        """Give every rank its slice of the parameter.

        Args:
            whole: the new weight, on its owner; None elsewhere.
        """
        mine = torch.empty(
            self.part.shape, dtype=self.parameter.dtype, device=self.parameter.device
        )
        slices = None
        if whole is not None:
            slices = [whole[place].to(mine.dtype).contiguous() for place in self._places()]
        dist.scatter(mine, slices, group=self._group, group_src=self.owner)
        self.part.local(self.parameter).copy_(mine)

    def _places(self) -> list[tuple[slice, ...]]:
        """Where the slice of each rank lies in the whole tensor."""
        sizes = list(zip(self.part.shape, self.part.global_shape, strict=True))
        return [
            tuple(
                slice(rank * size, (rank + 1) * size) if size < whole else slice(0, size)
                for size, whole in sizes
            )
            for rank in range(self._group.size())
        ]


class MuonWithAdamW:
    """See `pretrain.engines.base.Optimizer`.

    Args:
        config: the run.
        layout: the process layout the run was started on.
        model_chunks: this rank's model chunks; their gradients lie in Megatron's buffers.
    """

    shares_gradients = False

    def __init__(
        self, config: RunConfig, layout: Layout, model_chunks: list[DistributedDataParallel]
    ) -> None:
        self._options, self._layout = config.optimizer, layout
        parameters = [
            (parameter, slices)
            for model_chunk in model_chunks
            for _, parameter, slices in named_slices(model_chunk.module)
        ]
        group = layout.groups.dp_cp
        self._owned = with_owners([parameter for parameter, _ in parameters], group)
        own = [
            (parameter, part)
            for (parameter, slices), (_, owner) in zip(parameters, self._owned, strict=True)
            if owner == group.rank()
            for part in slices
        ]
        self._split = self._split_matrices(own)
        self._masters = [
            master for parameter, part in own if (master := self._master(parameter, part))
        ]
        self._adam = self._make_adam()
        self._masked = mask_on_device(self._adam, layout.device)
        compat.create_adam_state(self._adam)
        self._momentum: dict[Tensor, Tensor] = {}
        # One optimizer per matrix: a masked update keeps a copy of what it may have to restore, and
        # this way only one matrix has such a copy at a time.
        self._muons = [self._make_muon(master) for master in self._masters if master.is_matrix]

    def _make_adam(self) -> torch.optim.AdamW:
        """AdamW for everything but the matrices."""
        options = self._options
        rest = [master for master in self._masters if not master.is_matrix]
        groups = [
            self._group([m for m in rest if m.parameter.no_weight_decay == without], without)
            for without in (False, True)
        ]
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)

    def _make_muon(self, master: _Master) -> torch.optim.Muon:
        """Muon for one matrix, with a momentum that can be loaded into."""
        muon = torch.optim.Muon(
            [self._group([master], master.parameter.no_weight_decay)],
            lr=self._options.lr,
            momentum=self._options.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        momentum = self._momentum[master.weight] = torch.zeros_like(master.weight)
        muon.state[master.weight]["momentum_buffer"] = momentum
        return muon

    def _split_matrices(self, own: list[tuple[Tensor, ParameterSlice]]) -> dict[str, _SplitMatrix]:
        """The matrices that tensor-parallel ranks have slices of, in the same order on all."""
        group = self._layout.groups.tp
        split = [
            (p, part) for p, part in own if _is_matrix(part) and part.shape != part.global_shape
        ]
        owners = shared_out([math.prod(part.shape) for _, part in split], group.size())
        return {
            part.name: _SplitMatrix(parameter, part, owner, group)
            for (parameter, part), owner in zip(split, owners, strict=True)
        }

    def _master(self, parameter: Tensor, part: ParameterSlice) -> _Master | None:
        """The master weight of a slice, or of the whole matrix; None if another rank has it."""
        weight: Tensor | None = part.local(parameter.detach())
        offset, owned = part.global_offset, is_owner(parameter, self._layout)
        if matrix := self._split.get(part.name):
            weight, offset = matrix.gather(part.local(parameter.detach())), (0,) * len(offset)
        if weight is None:
            return None
        return _Master(parameter, part, offset, weight.float().clone().requires_grad_(), owned)

    def _group(self, masters: list[_Master], without_decay: bool) -> dict[str, Any]:
        decay = 0.0 if without_decay else self._options.weight_decay
        return {"params": [master.weight for master in masters], "weight_decay": decay}

    def gradient_norm(self) -> Tensor:
        """Take the gradients from the buffers; their 2-norm over all ranks, fp64.

        Replicated and tied tensors count once.
        """
        whole = {
            name: matrix.gather(matrix.part.local(matrix.parameter.main_grad))
            for name, matrix in self._split.items()
        }
        for master in self._masters:
            gradient = whole.get(master.part.name)
            if gradient is None:
                gradient = master.part.local(master.parameter.main_grad)
            master.weight.grad = gradient.float().contiguous()
        counted = [master.weight.grad for master in self._masters if master.owned]
        total = sum_of_squares(counted, self._layout.device)
        for group in (self._layout.groups.dp_cp, self._layout.groups.mp):
            dist.all_reduce(total, group=group)
        return total.sqrt()

    @torch.no_grad()
    def step(self, lr: float, verdict: Verdict) -> None:
        """Clip and update with learning rate `lr` if the verdict allows it."""
        if not self._masked and not verdict.read().accepted:
            return
        weights = [master.weight for master in self._masters]
        clip_gradients(weights, self._options.clip_grad, verdict.grad_norm)
        for optimizer in (*self._muons, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = lr
        if self._masked:
            for muon in self._muons:
                self._step_masked(muon, verdict.rejected.bool())
            self._adam.found_inf = verdict.rejected
        else:
            for muon in self._muons:
                muon.step()
        self._adam.step()
        whole: dict[str, Tensor] = {}
        for master in self._masters:
            if master.part.name in self._split:
                whole[master.part.name] = master.weight
            else:
                master.part.local(master.parameter).copy_(master.weight)
        for name, matrix in self._split.items():
            matrix.scatter(whole.get(name))
        send_from_owners(self._owned, self._layout.groups.dp_cp)

    def _step_masked(self, muon: torch.optim.Muon, rejected: Tensor) -> None:
        """Update one matrix, and take that back where `rejected` is true, all on the device."""
        (weight,) = muon.param_groups[0]["params"]
        changed = (weight, self._momentum[weight])
        before = [tensor.clone() for tensor in changed]
        muon.step()
        for tensor, old in zip(changed, before, strict=True):
            # Not arithmetic with a factor of 0: an update of NaN times 0 is NaN.
            tensor.copy_(torch.where(rejected, old, tensor))

    def clear_gradients(self) -> None:
        """Forget the gradients that `gradient_norm` took."""
        for master in self._masters:
            master.weight.grad = None

    def slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with its master weights and Muon's momentum or Adam's moments."""
        for master in self._masters:
            part, weight = master.part, master.weight
            state = {"param": weight.detach()}
            if weight in self._momentum:
                state["momentum"] = self._momentum[weight]
            else:
                state |= {key: self._adam.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
            for key, tensor in state.items():
                name = optimizer_prefix(key) + part.name
                yield (
                    master.parameter,
                    TensorSlice(name, part.global_shape, master.offset, tensor),
                )

    def gradients(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of its gradient."""
        for master in self._masters:
            part, gradient = master.part, master.weight.grad
            assert gradient is not None
            yield (
                master.parameter,
                TensorSlice(part.name, part.global_shape, master.offset, gradient),
            )

    def set_updates(self, updates: int) -> None:
        """Tell that the state was loaded, and how many updates were done before."""
        compat.set_adam_step(self._adam, updates)
