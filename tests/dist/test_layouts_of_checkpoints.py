"""Save at any layout and engine, load at any other: weights and moments are the same bits.

A seeded sample of pairs: the layouts shuffled into a ring, each one's checkpoint loaded by the
next, so that every layout saves once and loads once.
"""

import math
import random
from typing import Any
from unittest import mock

import pytest
import torch

from pretrain.checkpoint import TensorSlice, find_latest, load_checkpoint, save_checkpoint
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from xlstm_io.checkpoint.manifest import is_weight
from xlstm_io.checkpoint.reader import CheckpointReader

SEED = 11
MODEL = "large_deep"  # four layers, so that it also has four stages
SP: dict[str, Any] = {"layout__tensor": 2, "layout__sequence": True}
ZERO1: dict[str, Any] = {"engine__name": "deepspeed", "engine__zero_stage": 1}
ZERO3 = ZERO1 | {"engine__zero_stage": 3}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"layout__tensor": 2}),
    "tp4_sp": (4, {"layout__tensor": 4, "layout__sequence": True}),
    "pp4": (4, {"layout__pipeline": 4}),
    "pp2_vpp2": (2, {"layout__pipeline": 2, "layout__virtual": 2}),
    "dp3_of_unequal_shards": (3, {"data__global_batch": 6}),
    "dp4": (4, {}),
    "dp2_tp2_sp": (4, SP),
    "dp2_pp2": (4, {"layout__pipeline": 2}),
    "tp2_pp2_vpp2": (4, {**SP, "layout__pipeline": 2, "layout__virtual": 2}),
    "cp2_dp2": (4, {"layout__context": 2}),
    "cp2_tp2_sp": (4, {**SP, "layout__context": 2}),
    "zero1_dp2": (2, ZERO1),
    "zero1_pp2_tp2_sp": (4, {**ZERO1, **SP, "layout__pipeline": 2}),
    "zero3_dp3": (3, {**ZERO3, "data__global_batch": 6}),
    "zero3_tp2_sp_dp2": (4, {**ZERO3, **SP}),
}
RING = random.Random(SEED).sample(list(LAYOUTS), len(LAYOUTS))
PAIRS = list(zip(RING, RING[1:] + RING[:1], strict=True))


def has_deepspeed(pair):
    """Whether a pair cannot run without DeepSpeed."""
    return any("engine__name" in LAYOUTS[name][1] for name in pair)


CASES = [
    pytest.param(
        *pair,
        id="-".join(pair),
        marks=[needs_deepspeed] if has_deepspeed(pair) else [],
    )
    for pair in PAIRS
]


def save(config, root):
    """A step, so that moments are not zero, and a checkpoint."""
    engine, layout = work.make_engine(config)
    work.train_steps(engine, layout, config, 0, 1)
    save_checkpoint(root, engine.sharded_state(), {}, config.model_dump(mode="json"), step=1)


def load(config, path):
    """What this rank would save after loading; everything was something else before."""
    engine, _ = work.make_engine(config)
    with torch.no_grad():
        for chunk in engine.sharded_state():
            chunk.tensor.fill_(-3.0)
    engine.load_sharded_state(lambda chunks: load_checkpoint(path, chunks), 1)
    return [
        TensorSlice(c.name, c.global_shape, c.global_offset, c.tensor.detach().clone())
        for c in engine.sharded_state()
    ]


def bytes_read(config, path):
    """Bytes of weights and of the optimizer's state that this rank reads at a resume."""
    engine, _ = work.make_engine(config, initial_values=False)
    read, reading = {True: 0, False: 0}, CheckpointReader._read_stored

    def counted(reader, name, stored, into):
        read[is_weight(name)] += into.numel() * into.element_size()
        reading(reader, name, stored, into)

    with mock.patch.object(CheckpointReader, "_read_stored", counted):
        engine.load_sharded_state(lambda chunks: load_checkpoint(path, chunks), 1)
    return read[True], read[False]


@pytest.mark.dist
@pytest.mark.parametrize(
    "name",
    ["dp4", "cp2_dp2", "dp2_pp2", "muon_dp4", pytest.param("zero1_dp2", marks=needs_deepspeed)],
)
def test_each_byte_is_read_by_one_replica(pool, tmp_path, name):
    """A thousand replicas that read all weights would read a thousand times as much."""
    muon = {"optimizer__name": "muon", "engine__zero_stage": 0}
    ranks, shape = (4, muon) if name == "muon_dp4" else LAYOUTS[name]
    config = work.run_config(MODEL, **shape)
    pool(ranks, save, config, str(tmp_path))
    path = find_latest(tmp_path)
    read = pool(ranks, bytes_read, config, str(path))
    sizes = {True: 0, False: 0}
    with CheckpointReader(path) as reader:
        for tensor, about in reader.manifest.tensors.items():
            sizes[is_weight(tensor)] += math.prod(about.shape) * about.dtype.itemsize
    weights, state = zip(*read, strict=True)
    assert sum(weights) == sizes[True] and sum(state) == sizes[False]
    assert max(weights) < 2 * sizes[True] / ranks


@pytest.mark.dist
@pytest.mark.parametrize(("source", "target"), CASES)
def test_bits_survive_a_change_of_layout(pool, tmp_path, source, target):
    ranks, shape = LAYOUTS[source]
    pool(ranks, save, work.run_config(MODEL, **shape), str(tmp_path))
    path = find_latest(tmp_path)
    ranks, shape = LAYOUTS[target]
    parts = pool(ranks, load, work.run_config(MODEL, **shape), str(path))
    got = work.assemble(parts)  # in fp64, which holds every fp32 number
    with CheckpointReader(path) as reader:
        assert got.keys() == reader.manifest.tensors.keys()
        for name, value in got.items():
            assert torch.equal(value, reader.read(name).double()), name
            assert value.abs().max() > 0 or name.endswith("bias"), name
