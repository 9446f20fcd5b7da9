"""What processes find out about GPUs before torch is there, on a machine without one."""

import os
import stat
import subprocess

import pytest

from pretrain.config import ConfigError
from pretrain.processes import devices


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver is installed, and torch says that there is one GPU."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "DRIVERS", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    answer = subprocess.CompletedProcess([], 0, stdout="1\n")
    monkeypatch.setattr(devices.subprocess, "run", lambda *args, **options: answer)
    return tmp_path


def test_more_workers_than_gpus_are_refused_before_they_start(driver):
    devices.check_gpus(1)
    with pytest.raises(ConfigError, match=r"2 processes need 2 GPUs.*shows 1; use --nproc 1"):
        devices.check_gpus(2)


def test_without_a_driver_nobody_asks_torch(monkeypatch):
    monkeypatch.setattr(devices, "DRIVERS", ())
    monkeypatch.setattr(devices.subprocess, "run", lambda *args, **options: pytest.fail("asked"))
    devices.check_gpus(8)


def test_defaults_leave_what_is_set(driver):
    environment = {"PYTORCH_ALLOC_CONF": "backend:native"}
    devices.set_device_defaults(1, environment)
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["PYTORCH_ALLOC_CONF"] == "backend:native"
    cache = environment["TRITON_CACHE_DIR"]
    assert cache == str(driver / f"triton-{os.getuid()}")
    assert stat.S_IMODE(os.stat(cache).st_mode) == 0o700


@pytest.mark.parametrize(("tensor", "queues"), [(1, None), (2, "1")])
def test_one_queue_of_work_with_tensor_parallelism_only(tensor, queues, monkeypatch):
    monkeypatch.setattr(devices, "DRIVERS", ())
    environment: dict[str, str] = {}
    devices.set_device_defaults(tensor, environment)
    assert environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues
    assert "TRITON_CACHE_DIR" not in environment


def test_a_cache_that_others_can_write_is_not_used(driver):
    folder = driver / f"triton-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    environment: dict[str, str] = {}
    devices.set_device_defaults(1, environment)
    assert "TRITON_CACHE_DIR" not in environment
