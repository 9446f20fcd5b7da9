"""Our layers in megatron-core's GPTModel on several ranks: gradients, Megatron's checkpoints."""

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from megatron.core.models.gpt import GPTModel

from pretrain import layout as layouts
from pretrain.checkpoint import TensorSlice
from tests.dist import work
from tests.xlstm_mcore.test_specs import mask_of
from xlstm_mcore.build import make_config
from xlstm_mcore.gpt_specs import gpt_layer_spec, prepare_gpt_model
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.parameters.slices import named_slices


def build(run, layout, seed):
    shape = run.layout
    config = make_config(
        {**run.model.model_dump(), "pattern": run.model.pattern.replace("|", "")},
        layout={"tensor": shape.tensor, "sequence": shape.sequence, "pipeline": shape.pipeline},
    )
    config.params_dtype = config.pipeline_dtype = torch.float64
    cpu_runtime.activate()
    rank, size = layout.groups.pp.rank(), layout.groups.pp.size()
    model = GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_spec(config, rank),
        vocab_size=config.vocab_size,
        max_sequence_length=run.data.seq_len,
        pre_process=rank == 0,
        post_process=rank == size - 1,
        position_embedding_type="none",
        pg_collection=layout.groups,
    )
    prepare_gpt_model(model, config, seed)
    return model


def gradients_and_checkpoint(run):
    """Gradients of one micro-batch, and what this rank would write into Megatron's checkpoint."""
    layout = layouts.start(run)
    model = build(run, layout, seed=3)
    work.perturb([model])
    batch = work.random_batches(run, 0)[0]
    losses = model(batch.tokens, None, mask_of(batch.boundaries), labels=batch.labels)
    (losses * batch.loss_mask).sum().backward()
    for _, parameter, _ in named_slices(model):
        if parameter.sequence_parallel:  # what finalize_model_grads does
            torch.distributed.all_reduce(parameter.grad, group=layout.groups.tp)
    saved = model.sharded_state_dict()
    apply_factories(saved)
    _, everywhere = determine_global_metadata(saved)
    validate_sharding_integrity(everywhere)
    parts = [
        TensorSlice(t.key, t.global_shape, t.global_offset, t.data.detach().clone())
        for t in nested_values(saved)
        if isinstance(t, ShardedTensor) and is_main_replica(t.replica_id)
    ]
    gradients = [
        TensorSlice(p.name, p.global_shape, p.global_offset, p.local(parameter.grad))
        for _, parameter, slices in named_slices(model)
        if parameter.tensor_model_parallel or layout.groups.tp.rank() == 0
        for p in slices
    ]
    return gradients, parts


def load(run, tensors):
    """Whether a model on this layout has the right weights after it was given a checkpoint's."""
    layout = layouts.start(run)
    model = build(run, layout, seed=4)
    wanted = model.sharded_state_dict()
    factories, _ = extract_matching_values(
        wanted, lambda x: isinstance(x, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(wanted)

    def read(t):
        if not isinstance(t, ShardedTensor):
            return None
        sizes = zip(t.global_offset, t.local_shape, strict=True)
        return tensors[t.key][tuple(slice(o, o + n) for o, n in sizes)]

    dict_list_map_inplace(read, wanted)
    state = apply_factory_merges(wanted, factories)
    model.load_state_dict({key: value for key, value in state.items() if value is not None})
    expected = build(run, layout, seed=3)
    work.perturb([expected])
    return [
        (name, torch.equal(a, b))
        for (name, a), (_, b) in zip(
            model.named_parameters(), expected.named_parameters(), strict=True
        )
    ]


@pytest.mark.dist
@pytest.mark.parametrize("model", ["mixed", "hybrid"])
def test_tensor_parallel_equals_one_process_and_checkpoints_reshard(pool, model):
    run = work.run_config(model)
    ((gradients, _),) = pool(1, gradients_and_checkpoint, run)
    expected = work.assemble([gradients])
    split = work.run_config(model, layout__tensor=2, layout__sequence=True)
    answers = pool(2, gradients_and_checkpoint, split)
    got = work.assemble([gradients for gradients, _ in answers])
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    tensors = work.assemble([parts for _, parts in answers])
    assert set(expected) - {"decoder.final_norm.weight"} <= set(tensors)
    for ranks, changes in ((1, {}), (2, {"layout__pipeline": 2}), (2, {"layout__tensor": 2})):
        for same in pool(ranks, load, work.run_config(model, **changes), tensors):
            assert all(equal for _, equal in same), same
