"""GPUs that a run can be rehearsed and planned for: the makers' figures."""

from dataclasses import dataclass, replace

from xlstm_io.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it.

    Attributes:
        name: what users call it.
        memory: bytes of device memory.
        tflops: dense bf16 TFLOP/s.
        gbs_memory: GB/s of its memory.
        gbs_node: GB/s that it sends to GPUs of its node.
        gbs_network: GB/s that it sends to other nodes, its share of the node's network.
        processors: multiprocessors.
        shared: bytes of shared memory that a program may have.
    """

    name: str
    memory: int
    tflops: float
    gbs_memory: float
    gbs_node: float
    gbs_network: float
    processors: int
    shared: int

    def with_network(self, gbs: float) -> "Gpu":
        """The same GPU in nodes that send `gbs` GB/s to other nodes, all their GPUs together."""
        return replace(self, gbs_network=gbs / GPUS_PER_NODE)


GPUS_PER_NODE = 8

# What the driver, NCCL's buffers and the gaps between allocations take, beyond tensors.
RESERVE = 4_000_000_000

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40_000_000_000, 312.0, 1555, 300, 25, 108, 166_912),
        Gpu("a100", 80_000_000_000, 312.0, 2039, 300, 25, 108, 166_912),
        Gpu("h100", 80_000_000_000, 989.4, 3350, 450, 50, 132, 232_448),
        Gpu("h200", 141_000_000_000, 989.4, 4800, 450, 50, 132, 232_448),
        Gpu("b200", 180_000_000_000, 2250.0, 7700, 900, 50, 148, 232_448),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of a name; raises ConfigError where there is none."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu={name} is not known; use one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
