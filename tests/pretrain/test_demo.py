"""The demo's commands, their order, exit codes and signals, with stand-ins for the stages."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.commands.run import demo
from pretrain.commands.run.demo import CONFIGS, Places, Text, main, shown
from pretrain.supervision.progress_file import Progress
from xlstm_io.errors import ConfigError

# `python -m NAME` finds these in the current folder before the real packages.
STAGE = """
import json, os, signal, sys, time
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([NAME, *sys.argv[1:]]) + "\\n")
if sys.argv[1] == os.environ.get("FAIL_AT"):
    sys.exit(int(os.environ["FAIL_WITH"]))
if sys.argv[1] == os.environ.get("HANG_AT"):
    got = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(number))
    open("hanging", "w").close()
    limit = time.monotonic() + 300  # a failing test leaves nothing behind for long
    while not got and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.5)  # saving
    open("signals", "w").write(" ".join(str(int(number)) for number in got))
    sys.exit(75)
"""
DEMO = "import sys; from pretrain.commands.run.demo import main; sys.exit(main(work='w', steps=20))"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A folder with stand-ins for every stage; returns a reader of the calls made."""
    for name in ("data_prep", "pretrain"):
        (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}" + STAGE)
    (tmp_path / "xlstm_mcore").mkdir()
    (tmp_path / "xlstm_mcore" / "__init__.py").write_text("")
    (tmp_path / "xlstm_mcore" / "convert.py").write_text("NAME = 'xlstm_mcore.convert'" + STAGE)
    monkeypatch.chdir(tmp_path)
    for name in ("FAIL_AT", "FAIL_WITH", "HANG_AT", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)

    def calls():
        import json

        text = (tmp_path / "calls.jsonl").read_text() if Path("calls.jsonl").exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    return calls


def test_all_stages_in_order(stages, capfd):
    assert main(model="large", steps=200, work="runs/demo") == 0
    names = [call[1] for call in stages()]
    assert names == [
        *["collect", "tokenizer", "build", "baselines", "launch"],
        *["to-hf", "verify", "generate", "report"],
    ]
    out = capfd.readouterr().out
    for call in stages():
        assert f"$ {shown(call)}" in out, "what is printed is what runs"
    launch = stages()[4]
    assert "--run.steps" in launch
    assert launch[launch.index("--run.dir") + 1] == "runs/demo/large"
    assert launch[launch.index("--data.path") + 1] == "runs/demo/data-stdlib/shards"
    assert "--schedule.warmup_steps" not in launch


def test_classic_has_the_same_stages(stages):
    assert main(model="classic", steps=5, work="w") == 0
    names = [call[1] for call in stages()]
    assert names[-4:] == ["to-hf", "verify", "generate", "report"]
    launch = stages()[4]
    assert launch[launch.index("--schedule.warmup_steps") + 1] == "2"


def test_the_launch_command_is_a_valid_one():
    from pretrain.config import load_config, split_overrides

    places = Places.of(Path("w"), "large", Text())
    for model in CONFIGS:
        for steps in (1, 5, 200):
            words = demo.train_command(places, model, steps, 2)
            (*_, path, flag, nproc), overrides = split_overrides(words)
            assert (flag, nproc) == ("--nproc", "2")
            assert load_config(path, overrides).run.steps == steps


@pytest.mark.parametrize(("gpus", "nproc"), [(0, "2"), (1, "1"), (2, "2")])
def test_one_gpu_trains_in_one_process(stages, monkeypatch, gpus, nproc):
    monkeypatch.setattr(demo, "count_gpus", lambda: gpus)
    assert main(steps=5, work="w") == 0
    launch = stages()[4]
    assert launch[launch.index("--nproc") + 1] == nproc
    assert ("--layout.tensor" in launch) == (nproc == "1")


def test_own_data_get_their_own_folders(stages):
    assert main(steps=5, work="w", data="texts/*.txt") == 0
    collect = stages()[0]
    assert collect[collect.index("--input") + 1] == "texts/*.txt"
    own, other = (Places.of(Path("w"), "large", Text(data)) for data in ("texts/*.txt", "more"))
    standard = Places.of(Path("w"), "large", Text())
    assert len({own.data, other.data, standard.data}) == 3
    assert len({own.run, other.run, standard.run}) == 3
    assert standard.data == Path("w/data-stdlib")
    assert Places.of(Path("w"), "classic", Text()).data == standard.data, "both models share data"


def test_another_field_and_vocabulary_reach_every_stage(stages):
    text = Text("texts", "content", 4096)
    keys = {"data": "texts", "text_field": "content", "vocab_size": 4096}
    assert main(steps=5, work="w", **keys) == 0
    collect, tokenizer, *_ = stages()
    launch = next(call for call in stages() if call[1] == "launch")
    assert collect[collect.index("--text-field") + 1] == "content"
    assert tokenizer[tokenizer.index("--vocab-size") + 1] == "4096"
    assert launch[launch.index("--model.vocab_size") + 1] == "4096"
    others = (Text("texts"), Text("texts", "content"), Text("texts", vocab_size=4096))
    places = [Places.of(Path("w"), "large", one) for one in (text, *others)]
    assert len({place.data for place in places}) == len({place.run for place in places}) == 4
    call = demo.make_command("large", 10, text, "runs/demo", None)
    assert call == "make pretrain DATA=texts TEXT_FIELD=content VOCAB=4096 STEPS=10"


@pytest.mark.parametrize(("stage", "code"), [("collect", 2), ("launch", 75), ("to-hf", 1)])
def test_the_exit_code_of_a_stage_ends_the_demo(stages, monkeypatch, stage, code):
    monkeypatch.setenv("FAIL_AT", stage)
    monkeypatch.setenv("FAIL_WITH", str(code))
    assert main(steps=5, work="w") == code
    assert stages()[-1][1] == stage


@pytest.mark.parametrize(
    "keys",
    [{"steps": 0}, {"nproc": 0}, {"data": "  "}, {"vocab_size": 4097}],
    ids=["steps", "nproc", "data", "vocab"],
)
def test_bad_arguments(stages, keys):
    with pytest.raises(ConfigError):
        main(work="w", **keys)
    assert stages() == []


def test_fewer_steps_than_the_run_has_done_are_refused_before_any_stage(stages):
    run = Places.of(Path("w"), "classic", Text()).run
    run.mkdir(parents=True)
    Progress("done", 40, 40, 1, "c", 40).write(run)
    with pytest.raises(ConfigError, match="has done 40 steps already") as caught:
        main(model="classic", steps=20, work="w")
    assert "use make pretrain MODEL=classic WORK=w STEPS=40 or more" in str(caught.value)
    assert stages() == []
    assert main(model="classic", steps=40, work="w") == 0


def wait_for(path: str) -> None:
    limit = time.monotonic() + 120
    while not Path(path).exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["collect", "launch"])
def test_a_signal_to_the_demo_alone_reaches_the_stage(stages, monkeypatch, number, stage):
    monkeypatch.setenv("HANG_AT", stage)
    # -P: the demo itself comes from the real package, its stages from this folder.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", DEMO],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # no terminal that would signal the stage itself
    )
    wait_for("hanging")
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert Path("signals").read_text() == str(int(number))
    assert "the same command continues" in out
    assert stages()[-1][1] == stage


def test_ctrl_c_at_a_terminal_reaches_the_stage_once(stages, monkeypatch):
    monkeypatch.setenv("HANG_AT", "launch")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-P", "-c", DEMO])
    wait_for("hanging")
    os.write(terminal, b"\x03")
    text = b""
    try:
        while chunk := os.read(terminal, 65536):
            text += chunk
    except OSError:
        pass  # the other end is closed
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert Path("signals").read_text() == str(int(signal.SIGINT))
    assert b"Traceback" not in text


@pytest.mark.parametrize(
    ("number", "foreground", "sent"),
    [
        (signal.SIGINT, True, []),  # the terminal tells the stage itself
        (signal.SIGINT, False, [signal.SIGINT]),
        (signal.SIGTERM, True, [signal.SIGTERM]),
    ],
)
def test_only_what_the_stage_has_not_got_is_passed_on(monkeypatch, number, foreground, sent):
    class Child:
        returncode = None
        got: list[int]

        def send_signal(self, number):
            self.got.append(number)

    child = Child()
    child.got = []
    monkeypatch.setattr(demo, "_in_foreground", lambda: foreground)
    demo.Runner(_child=child)._handle(number, None)
    assert child.got == sent


def test_a_stop_in_the_last_moment_of_a_stage_starts_no_other(stages):
    with demo.Runner() as runner:
        runner.stopped_by = signal.SIGTERM
        assert demo.run_all(runner, [["data_prep", "collect"]]) == 75
    assert stages() == []
