"""What both engines share: the part of the model that this rank holds."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint import TensorSlice
from pretrain.config import RunConfig
from pretrain.data import Batch
from pretrain.engines.base import Held, LossSum
from pretrain.engines.bf16_products import products_for
from pretrain.engines.microbatches import evaluate, sum_losses
from pretrain.engines.next_tokens import next_tokens
from pretrain.engines.state import (
    MASTER,
    is_owner,
    send_from_owners,
    shared_out,
    weight_slices,
    with_owners,
)
from pretrain.layout import Layout
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.parameters.decay import decays
from xlstm_mcore.parameters.slices import named_slices

#: Weights that a replica saves for the others, if there are so many.
SHARE_BYTES = 256 << 20


class ModelEngine:
    """A model on this run's layout; engines add how it is trained.

    Args:
        config: the run.
        layout: the process layout the run was started on.
        initial_values: see `pretrain.engines.make_engine`.

    Attributes:
        models: this rank's model chunks (several with interleaved stages).
        model_chunks: what is called for each of them: the models, or an engine's wrappers.
        num_parameters: parameters of the whole model.
        own_losses: see `pretrain.engines.base.Engine`.
        has_gradient_buffers: whether the gradients lie in buffers of Megatron's DDP.
    """

    has_gradient_buffers = False

    def __init__(self, config: RunConfig, layout: Layout, *, initial_values: bool = True) -> None:
        self.config, self.layout = config, layout
        self.model_config = make_config(
            config.model,
            layout=config.layout,
            memory=config.memory,
            precision=config.engine.precision,
            backend=layout.backend,
            deterministic=config.run.deterministic,
            fuses_weight_gradients=self.has_gradient_buffers,
        )
        seed = config.run.seed if initial_values else None
        self.models = build_model(self.model_config, layout.groups, seed, self._finish_part)
        for _, parameter, slices in self._parameters():
            parameter.no_weight_decay = not decays(slices[0].name, config.optimizer.decay)
        self.model_chunks: list[nn.Module] = list(self.models)
        self.num_parameters = self._count_parameters()
        self._products = products_for(config.engine.precision, layout)
        self.own_losses: list[Tensor] = []

    def masters(self) -> Iterator[TensorSlice]:
        """See `pretrain.engines.base.Engine`."""
        return (p for p in self._counted(self._optimizer_slices()) if p.name.startswith(MASTER))

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `pretrain.engines.base.Engine`."""
        return evaluate(
            lambda micro_batches: self._run(micro_batches, forward_only=True),
            self.model_chunks,
            batches,
            self.layout.groups.pp.size(),
        )

    def next_tokens(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """See `pretrain.engines.base.Engine`."""
        model = self.config.model
        vocabulary = model.vocab_tokens or model.vocab_size
        with self._products():
            return next_tokens(self._callables(), texts, vocabulary, self.layout)

    def sharded_state(self) -> list[TensorSlice]:
        """The slices this rank saves: every element of the state is saved by exactly one rank."""
        return list(self._counted((*self._share_of_weights(), *self._optimizer_slices())))

    def held(self) -> Iterator[Held]:
        """What this rank holds that other ranks may hold too.

        The optimizer state is partitioned, so data-parallel replicas have none in common.
        """
        yield from self._held_weights()
        for parameter, part in self._optimizer_slices():
            split = parameter.tensor_model_parallel
            yield Held(part.name, part.tensor, over_data=False, over_tensor=not split)

    def _run(self, batches: list[Batch], *, forward_only: bool) -> Tensor:
        """Run micro-batches; returns what `sum_losses` does."""
        raise NotImplementedError

    def _optimizer_slices(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter with the slices of master weight and moments that this rank has."""
        raise NotImplementedError

    def _counted(self, parts: Iterable[tuple[Tensor, TensorSlice]]) -> Iterator[TensorSlice]:
        """Those that no other rank counts."""
        return (part for parameter, part in parts if is_owner(parameter, self.layout))

    def _callables(self) -> list[nn.Module]:
        """What is called for a forward pass of each of this rank's model chunks."""
        return self.model_chunks

    def _finish_part(self, part: nn.Module) -> None:
        """Called with an embedding, layer or head when it has its values; see build_model."""

    def _parameters(self) -> Iterator[tuple[str, Tensor, list]]:
        """Name, parameter and slices of everything in this rank's model chunks."""
        for model in self.models:
            yield from named_slices(model)

    def _weights(self) -> Iterator[tuple[Tensor, TensorSlice]]:
        """Each parameter of this rank with the slices of the weights it holds."""
        for _, parameter, slices in self._parameters():
            for part in weight_slices(parameter, slices):
                yield parameter, part

    def _share_of_weights(self) -> list[tuple[Tensor, TensorSlice]]:
        """The weights that this rank saves, where every replica has all of them.

        Of a large model one replica alone would write a hundred times what the others do, and at a
        resume the ranks would read its file at once. But each more file is one more to open.
        """
        group, weights = self.layout.groups.dp_cp, list(self._weights())
        sizes = [part.tensor.numel() * part.tensor.element_size() for _, part in weights]
        savers = min(group.size(), max(1, sum(sizes) // SHARE_BYTES))
        owners = shared_out(sizes, savers)
        return [one for one, owner in zip(weights, owners, strict=True) if owner == group.rank()]

    def _load_shared(
        self, load: Callable[[list[TensorSlice]], Any], state: Iterable[TensorSlice]
    ) -> None:
        """Fill the weights, where every replica has all of them, and state that this rank has.

        Each replica reads its share of the weights and sends it to the others: a thousand that read
        all of them would read a thousand times as much from one file system. Called by all ranks.

        Args:
            load: see `load_sharded_state`. When it returns, no rank's reading has failed.
            state: what this rank reads besides.
        """
        group = self.layout.groups.dp_cp
        found = [(parameter, slices) for _, parameter, slices in self._parameters()]
        owned = with_owners([parameter for parameter, _ in found], group)
        mine = [
            part
            for (parameter, slices), (_, owner) in zip(found, owned, strict=True)
            if owner == group.rank()
            for part in weight_slices(parameter, slices)
        ]
        load([*mine, *state])
        self._spread_weights(owned)

    def _spread_weights(self, owned: Sequence[tuple[Tensor, int]]) -> None:
        """Give every replica the weights that their owners have read; see `with_owners`."""
        send_from_owners(owned, self.layout.groups.dp_cp)

    def _sum(self, losses: list[Tensor], batches: list[Batch]) -> Tensor:
        """Add up the losses of micro-batches over the whole layout, and keep this rank's."""
        self.own_losses = losses
        return sum_losses(losses, self.layout, batches[0].sources.shape[1])

    def _held_weights(self) -> Iterator[Held]:
        """Every parameter, where each data-parallel replica has all of it."""
        for _, parameter, slices in self._parameters():
            split = parameter.tensor_model_parallel
            yield Held(slices[0].name, parameter.detach(), over_data=True, over_tensor=not split)

    def _count_parameters(self) -> int:
        """Parameters of the whole model, counted from what all ranks hold."""
        mine = sum(
            math.prod(part.shape)
            for _, parameter, slices in self._parameters()
            for part in slices
            if is_owner(parameter, self.layout)
        )
        count = torch.tensor(mine, dtype=torch.int64, device=self.layout.device)
        torch.distributed.all_reduce(count)
        return int(count.item()) // self.layout.groups.dp_cp.size()
