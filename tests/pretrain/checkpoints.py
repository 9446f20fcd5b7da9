"""Small states of a model for tests of checkpoints."""

import torch

from pretrain.checkpoint import TensorSlice, load_checkpoint


def slices_of(*values):
    tensors = [torch.full((6, 4), float(value)) for value in values]
    return [TensorSlice(f"w{n}", (6, 4), (0, 0), tensor) for n, tensor in enumerate(tensors)]


def first_value(path):
    target = torch.zeros(6, 4)
    load_checkpoint(path, [TensorSlice("w0", (6, 4), (0, 0), target)])
    return target[0, 0].item()


def steps_in(folder):
    return sorted(int(p.name.split("-")[1]) for p in folder.iterdir())
