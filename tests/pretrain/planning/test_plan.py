"""A plan: what it counts from a few blocks is what the whole run takes, and the order is right."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.commands.before_run import plan
from pretrain.config import ConfigError, check_world, load_config
from pretrain.config.cuts import cut_evenly
from pretrain.planning.layouts import Layout, with_layout
from pretrain.planning.tried import Estimate, Tried
from tests.dist import work
from xlstm_io.errors import ExitCode

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "pretrain" / "configs").glob("*.yaml"))


def run(config, gpus=16, network=None):
    options = SimpleNamespace(gpus=gpus, gpu="h100", network=network, write=None)
    return plan.run(options, config, [])


@pytest.fixture(scope="module")
def results(warm_python):
    done = subprocess.run(
        [warm_python.executable, "-m", "tests.pretrain.planning.cases"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_few_blocks_tell_what_all_of_them_take(results):
    for case in results["counted"]:
        few, whole = case["memory"]
        assert few == pytest.approx(whole, rel=0.03), case
        for few, whole in case["sent"]:
            assert few == pytest.approx(whole, rel=0.01), case


def test_the_fastest_layout_that_fits_comes_first(results):
    speeds = [speed for _, why_not, speed in results["fits"] if not why_not]
    assert speeds and speeds == sorted(speeds, reverse=True)
    # Where memory suffices nothing is computed twice.
    assert all("recompute none" in name for name, why_not, _ in results["fits"] if not why_not)
    assert not results["fits"][0][1]


def test_each_loser_says_why(results):
    impossible = {layout: why for layout, why, speed in results["fits"] if speed is None}
    assert any("more than 2 blocks" in why for why in impossible.values())
    lost = [why for _, why, speed in results["nothing"] if speed is not None]
    assert lost and all("GB more than small has" in why for why in lost)


def test_the_command_prints_the_table_and_writes_the_best(results):
    command = results["command"]
    assert command["code"] == 0
    lines = command["text"].splitlines()
    assert lines[0].startswith("4 x h100: 80 GB each") and "not possible:" in lines
    assert lines[-2].endswith("tensor 1, pipeline 1, recompute none, micro_batch 1")
    assert lines[-1].endswith("planned.yaml --nproc 4"), "what to do with the file"
    assert command["written"]["memory"]["recompute"] == "none"


def test_the_row_of_a_small_run_is_not_all_zeros(monkeypatch, capsys):
    config = work.run_config("large", engine__precision="fp32")
    seconds = dict.fromkeys(
        ("compute", "bubble", "tensor messages", "stage messages", "gradients and weights"), 0.00124
    )
    found = Estimate({"weights": 2_500_000.0}, seconds, 1e6, 0.1, 75_000_000_000.0)
    tried = [Tried(Layout(1, 1, "none", 1), config, found)]
    monkeypatch.setattr(plan, "plan", lambda *_: tried)
    assert run(config, gpus=8) == 0
    text = capsys.readouterr().out
    assert "engine.precision=fp32 is several times slower" in text
    row = text.splitlines()[5].split()
    assert row[:8] == ["1", "1", "none", "1", "0.0025", "75.0", "1,000,000", "10.0%"]
    assert row[8:] == ["0.0062", "0.0012", "0.0025", "0.0012"]


def test_the_network_of_the_nodes_is_part_of_the_plan(monkeypatch):
    asked = []

    def note(config, gpus, gpu):
        asked.append(gpu)
        return [Tried(Layout(1, 1, "none", 1), why_not="tried elsewhere")]

    monkeypatch.setattr(plan, "plan", note)
    config = work.run_config("large")
    for network in (None, 100.0):
        assert run(config, network=network) == ExitCode.REFUTED
    assert [gpu.gbs_network for gpu in asked] == [50.0, 12.5], "a node's share of 8 GPUs"
    with pytest.raises(ConfigError, match="--network=0 sends nothing"):
        run(config, network=0.0)
    zero = work.run_config("large", engine__name="deepspeed", engine__zero_stage=1)
    with pytest.raises(ConfigError, match="is not planned for"):
        run(zero)


def test_stages_have_about_the_same_work():
    config = work.run_config("large_deep", model__vocab_size=4096)
    # At this width the head is as much work as several blocks.
    first, last = cut_evenly(config, 2).split("|")
    assert first + last == "MMMM" and len(first) > len(last)
    assert cut_evenly(work.run_config("large_deep"), 2) == "MM|MM"


def test_a_layout_that_does_not_fit_the_run_says_why():
    config = work.run_config("large_deep")
    with pytest.raises(ConfigError, match="8 stages are more than 4 blocks"):
        with_layout(config, Layout(1, 8, "none", 1), 8)
    with pytest.raises(ConfigError, match="does not divide"):
        with_layout(config, Layout(8, 1, "none", 1), 8)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "cpu" not in p.stem], ids=lambda path: path.stem
)
def test_shipped_files_run_on_the_gpus_that_they_are_meant_for(path):
    stated = re.search(r"meant for (\d+) GPUs of 80 GB", path.read_text())
    gpus, config = int(stated[1]), load_config(path)
    assert check_world(config, gpus) * config.layout.tensor == gpus
    if config.data.global_batch >= 512:  # the larger models, of which docs/ plans one on 128
        check_world(config, 128)
