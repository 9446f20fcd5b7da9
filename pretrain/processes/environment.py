"""The variables by which a launcher tells a process its place in a run: RANK, WORLD_SIZE, ...

torchrun and `python -m pretrain launch` set the same ones, and `pretrain.processes.slurm_ranks`
sets them for the tasks of srun. Without them a run has one process. This module needs no torch, so
that a mistake in them is found in milliseconds.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from xlstm_io.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """A process's place among the processes of a run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        host: name or address of the machine of rank 0.
        port: where rank 0 listens there.
    """

    rank: int
    world_size: int
    host: str
    port: int


def read_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands; None for a run of one process, which no launcher has started.

    Raises:
        ConfigError: a variable is missing, is not a number, or does not fit the others, or the name
            of the machine of rank 0 cannot be resolved.
    """
    if "WORLD_SIZE" not in environment:
        return None
    world_size = _number(environment, "WORLD_SIZE", 1, 1 << 24)
    place = Place(
        rank=_number(environment, "RANK", 0, world_size - 1),
        world_size=world_size,
        host=_text(environment, "MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT", 1, 65535),
    )
    try:
        socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={place.host!r} cannot be resolved on {socket.gethostname()} "
            f"({error.strerror}); give the name or address of the machine of rank 0"
        ) from error
    return place


def _text(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name)
    if not text:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set but {name} is not; start the processes "
            "with torchrun, srun or python -m pretrain launch, or unset WORLD_SIZE"
        )
    return text


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = _text(environment, name)
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ConfigError(
            f"{name}={text!r} must be a whole number from {least} to {most}"
            + (f", as WORLD_SIZE={most + 1}" if name == "RANK" else "")
        )
    return int(text)
