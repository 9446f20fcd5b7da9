"""Save at any layout, load at any other: the weights and moments are the same bits.

A seeded sample of pairs; `LAYOUTS` is what it is drawn from.
"""

import random
from typing import Any

import pytest
import torch

from pretrain.checkpoint import Chunk, find_latest, load_checkpoint, save_checkpoint
from tests.dist import work
from xlstm_mcore.ckpt_reader import CheckpointReader

PAIRS, SEED = 6, 11
MODEL = "large_deep"  # four layers, so that it also has four stages
SP: dict[str, Any] = {"layout__tensor": 2, "layout__sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"layout__tensor": 2}),
    "tp4_sp": (4, {"layout__tensor": 4, "layout__sequence": True}),
    "pp2": (2, {"layout__pipeline": 2}),
    "pp4": (4, {"layout__pipeline": 4}),
    "pp2_vpp2": (2, {"layout__pipeline": 2, "layout__virtual": 2}),
    "dp2": (2, {}),
    "dp3_of_unequal_shards": (3, {"data__global_batch": 6}),
    "dp4": (4, {}),
    "dp2_tp2_sp": (4, SP),
    "dp2_pp2": (4, {"layout__pipeline": 2}),
    "tp2_pp2_vpp2": (4, {**SP, "layout__pipeline": 2, "layout__virtual": 2}),
}
SAMPLE = random.Random(SEED).sample([(a, b) for a in LAYOUTS for b in LAYOUTS if a != b], PAIRS)


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
        Chunk(c.name, c.global_shape, c.global_offset, c.tensor.detach().clone())
        for c in engine.sharded_state()
    ]


@pytest.mark.dist
@pytest.mark.parametrize(("source", "target"), SAMPLE, ids=[f"{a}-{b}" for a, b in SAMPLE])
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
