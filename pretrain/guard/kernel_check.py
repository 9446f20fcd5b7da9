"""The kernels prove themselves on a machine before a run spends hours on it.

The first start on a new combination of device, driver, packages, kernels and sizes compares the
run's own kernels with their references, which takes some seconds. What was found sound is noted for
the user, and the next start does not repeat it.
"""

import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

import xlstm_kernels
from pretrain.config import RunConfig
from pretrain.watching.provenance import driver, versions
from xlstm_io.errors import MachineFailed
from xlstm_mcore import hardware
from xlstm_mcore.kernel_check import Share, compare_kernels

FOLDER = "xlstm-pretrain/kernel-check"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kernel_problems(config: RunConfig, device: torch.device) -> list[str]:
    """What is wrong with the kernels of a run on a device: one sentence for each tensor."""
    data = config.data
    share = Share(data.micro_batch, data.seq_len, config.layout, config.memory)
    return compare_kernels(config.model, share, device, DTYPES[config.engine.precision])


def check_kernels_once(config: RunConfig, device: torch.device) -> None:
    """Compare the kernels of a run with their references, where `guard.kernel_check` wants it.

    Every rank does so by itself, on its own device. On a CPU the same code runs in the tests, so
    `once` leaves it out there.

    Raises:
        MachineFailed: they differ; the message names kernel and tensor.
    """
    wanted = config.guard.kernel_check
    if wanted == "off" or (wanted == "once" and device.type == "cpu"):
        return
    facts = _facts(config)
    note = _note_of(facts)
    if wanted == "once" and note.exists():
        return
    began = time.monotonic()
    problems = kernel_problems(config, device)
    hardware.forget_memory()  # calls as large as the run's: their peak is none of its own
    if problems:
        raise MachineFailed(
            f"{socket.gethostname()}: the kernels are wrong on this machine, and nothing was "
            "trained:\n  "
            + "\n  ".join(problems)
            + "\n--model.kernel_backend torch trains without them, --guard.kernel_check off trains "
            "nevertheless"
        )
    _write(note, {**facts, "seconds": round(time.monotonic() - began, 1)})


def _facts(config: RunConfig) -> dict[str, Any]:
    """Everything that the result depends on; sections are whole, so that no new key is missed."""
    return {
        "device": hardware.device_name(),
        "driver": driver(),
        "versions": versions(),
        "kernels": _hash_of_sources(Path(str(xlstm_kernels.__path__[0]))),
        "precision": config.engine.precision,
        "micro_batch": config.data.micro_batch,
        "seq_len": config.data.seq_len,
        "layout": config.layout.model_dump(),
        "memory": config.memory.model_dump(),
        "model": config.model.model_dump(),
    }


def _hash_of_sources(folder: Path) -> str:
    """Hash of the kernels' own code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _note_of(facts: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / FOLDER / f"{key[:32]}.json"


def _write(note: Path, facts: dict[str, Any]) -> None:
    """Note a result; where that cannot be done, the next start looks again."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        temporary.replace(note)
    except OSError:
        return
