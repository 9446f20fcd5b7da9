"""What a preflight's reports say about nodes, without a cluster; and its checks, in one process."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import save_config
from pretrain.processes import rendezvous
from slurm import scheduler
from slurm.job import health, life, preflight
from slurm.job.gpus import ROWS, STATE, bad_values, others
from slurm.job.health import Health, Verdict, judge
from slurm.job.preflight import Bad, check_command, check_disk, check_kernels, pairs
from slurm.job.state import Life, RunState, State, write
from tests.pretrain.run_files import config as run_config
from xlstm_kernels import mlstm_chunkwise, self_check
from xlstm_mcore import hardware

NODES = ("n1", "n2", "n3", "n4")
SOUND = {"versions": "Python 3.11", "clock": 100.0, "tflops": 50.0, "device_tflops": True}


def report(node, *, rank=0, bad=None, done=True, doing="links", interrupted=False, **facts):
    return {
        "node": node,
        "rank": rank,
        "doing": doing,
        "done": done,
        "check": bad[0] if bad else "",
        "bad": f"{bad[0]}: {bad[1]}" if bad else None,
        "interrupted": interrupted,
        "facts": {**SOUND, **facts},
    }


def verdict(*changed, nodes=NODES, limits=None):
    """Of sound nodes, but for the reports that are given."""
    odd = {one["node"] for one in changed}
    sound = [report(node) for node in nodes if node not in odd]
    return judge([*sound, *changed], nodes, limits or Health())


def test_sound_nodes_are_fit():
    assert verdict() == Verdict({})
    assert judge([report("n1")], ("n1",), Health()) == Verdict({})


def test_a_node_that_does_not_answer_is_the_bad_one():
    reports = [report(n, bad=("rendezvous", "timed out")) for n in NODES[:3]]
    assert judge(reports, NODES, Health()).bad_nodes == {"n4": "does not answer"}


def test_a_node_that_hangs_is_named_with_its_check():
    stuck = report("n2", done=False, doing="product")
    waiting = [report(n, done=False, doing="rendezvous") for n in ("n1", "n3", "n4")]
    assert judge([stuck, *waiting], NODES, Health()).bad_nodes == {
        "n2": "did not get beyond the check product"
    }


def test_any_rank_of_a_node_can_find_it_bad():
    found = verdict(report("n2"), report("n2", rank=1, bad=("product", "other bits")))
    assert found.bad_nodes == {"n2": "product: other bits"}


def test_what_fails_everywhere_is_not_the_nodes():
    found = judge([report(n, bad=("imports", "no torch")) for n in NODES], NODES, Health())
    assert found == Verdict({}, "preflight fails on every node: imports: no torch")
    apart = judge([report(n, bad=("rendezvous", n)) for n in NODES], NODES, Health())
    assert apart == Verdict({}, "the ranks do not meet: rendezvous: n1")


def test_of_one_node_nobody_knows_better_than_to_try_another():
    found = judge([report("n1", bad=("imports", "no torch"))], ("n1",), Health())
    assert found.bad_nodes == {"n1": "imports: no torch"}


def test_a_port_in_use_is_left_to_the_training():
    taken = [report(n, bad=("rendezvous", "x")) for n in NODES[1:]]
    taken.append(report("n1", bad=("rendezvous", "EADDRINUSE")))
    assert judge(taken, NODES, Health()) == Verdict({})


def test_an_interrupted_preflight_says_nothing():
    reports = [report(n, done=False, doing="product") for n in NODES[1:]]
    found = judge([report("n1", interrupted=True), *reports], NODES, Health())
    assert found == Verdict({}, cut_short=True) and not found.fit


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"versions": "Python 3.12"}, "has Python 3.12, the others Python 3.11"),
        ({"clock": 95.0}, "its clock differs by -5.0 s"),
        ({"tflops": 40.0}, "a device does 40.0 TFLOP/s, the median is 50.0"),
    ],
)
def test_the_odd_one_out_is_bad(facts, reason):
    assert verdict(report("n3", **facts)).bad_nodes == {"n3": reason}


def links(*speeds):
    return [{"with": "x", "gbs": speed} for speed in speeds]


def test_a_slow_node_is_named_and_not_its_partners():
    slow = [
        report("n1", links=links(1.0, 9.0)),
        report("n2", links=links(1.0, 1.0)),
        report("n3", links=links(1.0, 9.0)),
        report("n4", links=links(9.0, 9.0)),
    ]
    limits = Health(min_allreduce_gbs=5.0)
    assert judge(slow, NODES, limits).bad_nodes == {
        "n2": "all-reduces with other nodes are below 5.0 GB/s"
    }
    everywhere = judge([report(n, links=links(1.0)) for n in NODES], NODES, limits)
    assert everywhere.bad_nodes == {} and "on every node" in everywhere.failed


def test_every_node_is_in_two_pairs_of_a_ring():
    assert pairs(1) == [] and pairs(2) == [(0, 1)]
    for count in (3, 4, 7):
        ring = pairs(count)
        assert sorted(node for pair in ring for node in pair) == sorted([*range(count)] * 2)


def test_the_sites_command_is_shown_when_it_fails(monkeypatch):
    check_command(Health(command="true"))
    with pytest.raises(Bad, match="ended with 3: what is wrong"):
        check_command(Health(command="echo what is wrong; exit 3"))
    monkeypatch.setattr(preflight, "COMMAND_S", 0.2)
    with pytest.raises(Bad, match="did not end within"):
        check_command(Health(command="sleep 5"))


def test_a_full_disk_is_found(tmp_path):
    facts = {}
    limits = Health(min_free_run_gb=0.0, min_free_scratch_gb=0.0, scratch=str(tmp_path / "own"))
    check_disk(tmp_path, limits, facts)
    assert len(facts["write_mbs"]) == 2 and list(tmp_path.iterdir()) == [tmp_path / "own"]
    with pytest.raises(Bad, match="GB free, 1000000000 are wanted"):
        check_disk(tmp_path, Health(min_free_run_gb=1e9), facts)


def test_a_wrong_kernel_makes_its_node_unfit(tmp_path, monkeypatch):
    save_config(run_config(model__hidden_size=32, model__num_heads=2), tmp_path / "run.yaml")
    check_kernels(tmp_path / "run.yaml")

    def planted(*inputs, **options):
        result = mlstm_chunkwise(*inputs, **options)
        return result if options.get("return_last_state") else 1.1 * result

    monkeypatch.setattr(self_check, "mlstm_chunkwise", planted)
    with pytest.raises(Bad, match=r"mlstm_chunkwise on cpu in float32, hidden states: off by"):
        check_kernels(tmp_path / "run.yaml")


def test_a_rank_tries_the_device_that_it_trains_on(tmp_path, monkeypatch):
    """Four ranks of a node that all tried the first GPU would find it slow, and no other at all."""
    folder, current, tried = tmp_path / "slurm/life-1", [0], {}
    write(folder.parent / "health.json", asdict(Health(devices=4, min_free_run_gb=0.0)))
    for name, value in (("XLSTM_NODES", "n1"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hardware, "without_cuda", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    for check in ("product", "kernels"):
        note = partial(lambda name, *_: tried.update({name: preflight._device()}), check)
        monkeypatch.setattr(preflight, f"check_{check}", note)
    monkeypatch.setattr(preflight.signal, "signal", lambda *_: None)
    monkeypatch.setattr(preflight.os, "_exit", lambda _: None)
    preflight.main([str(folder)])
    assert json.loads((folder / "preflight/00002.json").read_text())["bad"] is None
    assert tried == dict.fromkeys(("product", "kernels"), torch.device("cuda", 2))


def test_the_clock_runs_while_the_device_does_what_is_counted(monkeypatch):
    """A device that has not done the first product yet would do four in the time of three."""
    done = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                done.append("product")
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(hardware, "mark", lambda: done.append("mark") or float(len(done)))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: done.append("all-reduce"))
    with Noting():
        preflight.check_product(Health(), {})
    assert done == ["product", "mark", *["product"] * preflight.ROUNDS, "mark"]
    done.clear()
    preflight._speed(torch.ones(4), None)
    assert done == ["all-reduce", "mark", *["all-reduce"] * preflight.ROUNDS, "mark"]


def test_clocks_are_read_when_all_ranks_have_come(monkeypatch):
    """A device is only asked for the all-reduce, and the host would go on at once."""
    done = []
    monkeypatch.setenv("WORLD_SIZE", "1024")
    monkeypatch.setattr(rendezvous, "allow_connections", done.append)
    monkeypatch.setattr(dist, "init_process_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda _: done.append("all-reduce"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    read = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: done.append("read") or read(self))
    monkeypatch.setattr(preflight.time, "time", lambda: done.append("clock"))
    preflight.check_rendezvous({})
    assert done == [1024, "all-reduce", "read", "clock"]


def test_a_preflight_of_its_own_says_which_nodes_are_fit(tmp_path, monkeypatch, capsys):
    """It compares the last save with KillWait too, for which no node is to blame."""
    facts = {"KillWait": "30 sec", "PreemptMode": "OFF"}
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setattr(scheduler, "facts", {"main": facts}.get)
    write(tmp_path / "progress.json", {"save_seconds": 45.0})
    folder = tmp_path / "slurm/preflight/7"
    write(folder.parent / "health.json", asdict(Health()))
    for rank, node in enumerate(NODES):
        bad = ("disk", "is full") if node == "n2" else None
        write(folder / f"preflight/{rank}.json", report(node, rank=rank, bad=bad))
    assert health.main([str(folder), *NODES]) == 70
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == ["n1: fit", "n2: disk: is full", "n3: fit", "n4: fit"]
    assert said[4].startswith("note: a save takes 45 s; KillWait is 30 s")
    found = json.loads((folder / "preflight.json").read_text())
    assert found["bad_nodes"] == {"n2": "disk: is full"} and len(found["notes"]) == 1
    write(folder / "preflight/1.json", report("n2", rank=1))
    assert health.main([str(folder), *NODES]) == 0


def test_a_life_says_after_its_preflight_that_a_save_is_too_slow(tmp_path, monkeypatch, capsys):
    files = RunState(tmp_path)
    files.save(State(lives=(Life(1, "7", 0, ("n1",), began=0.0, start_step=0),), job="7"))
    write(files.folder / "health.json", asdict(Health()))
    write(files.life_folder(1) / "preflight/0.json", report("n1"))
    write(tmp_path / "progress.json", {"save_seconds": 45.0})
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setattr(scheduler, "facts", lambda _: {"KillWait": "30", "PreemptMode": "OFF"})
    words = ["checked", str(tmp_path), "--life", "1"]
    assert life.main(words) == 0
    said = capsys.readouterr()
    assert said.out == "XLSTM_FIT=yes\n" and "note: a save takes 45 s" in said.err

    def silent(partition):
        raise scheduler.SlurmError("scontrol does not answer")

    monkeypatch.setattr(scheduler, "facts", silent)
    assert life.main(words) == 0  # which ends no life
    assert capsys.readouterr() == ("XLSTM_FIT=yes\n", "")


# What nvidia-smi prints, as its manual says; never run on a GPU.


def test_a_gpu_with_errors_that_stay_is_named():
    sound = "0, 0, No, Not Active, Not Active\n1, [N/A], [N/A], Not Active, Not Active\n"
    assert bad_values(sound, STATE) == [] and bad_values("", STATE) == []
    broken = "0, 2, No, Not Active, Not Active\n1, 0, Yes, Not Active, Active\n"
    assert bad_values(broken, STATE) == [
        "GPU 0 has memory errors that ECC could not correct",
        "GPU 1 has retired pages that wait for a restart",
        "GPU 1 has clocks that heat has slowed down",
    ]
    assert bad_values("GPU-5f, No, Yes\n", ROWS) == [
        "GPU GPU-5f has rows that could not be remapped"
    ]


def test_a_process_of_another_job_on_a_gpu_is_named():
    known = {1: b"A=b\0SLURM_JOB_ID=7\0", 2: b"SLURM_JOB_ID=77\0", 3: b""}
    text = "1, python\n2, python3\n3, [Not Found]\n4, in another container\n"
    assert others(text, "7", known.get) == [
        "another process is on a GPU: python3 (2)",
        "another process is on a GPU: [Not Found] (3)",
    ]
