"""Part 5: the kernels of a step of 6 blocks, their times, and how long the device is idle."""

import gzip
import shutil
from collections import Counter
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.steps import config_of
from benchmarks.train_step_gpu import random_batches
from pretrain import layout as layouts
from pretrain.engines import make_engine
from pretrain.trainer import train_step

SHOWN = 40


def rows(setting: Setting) -> Iterator[dict]:
    """The share of time that the device is idle, then kernels, the longest first."""
    config = config_of(setting, 6 if not setting.dry else 2, "selective")
    layout = layouts.start(config)
    engine = make_engine(config, layout)
    batches = random_batches(config, layout)
    for _ in range(2):
        train_step(engine, batches, 1e-6)
    activities = [ProfilerActivity.CPU]
    if not setting.dry:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        train_step(engine, batches, 1e-6)
    trace = setting.out / "step.json"
    profiler.export_chrome_trace(str(trace))
    with open(trace, "rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    engine.close()
    layouts.leave()
    kind = "CPU" if setting.dry else "CUDA"
    spans: list[tuple[float, float]] = []
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiler.events():
        if not str(event.device_type).endswith(kind):
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        times[event.name] += end - start
        launches[event.name] += 1
    yield {"name": "device", "idle": _idle(spans), "launches": sum(launches.values())}
    for name, microseconds in times.most_common(SHOWN):
        yield {"name": name[:120], "ms": microseconds / 1e3, "launches": launches[name]}


def _idle(spans: list[tuple[float, float]]) -> float:
    """The share of the time between the first and the last event in which none runs."""
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - min(start for start, _ in spans)
    return 1.0 - busy / whole if whole else 0.0
