"""The command line: exit codes, one message per mistake, help, and what reaches the modules."""

import errno
import gc
import os
import subprocess
import sys
import types

import pytest
import yaml

from pretrain import cli
from xlstm_io.errors import Interrupted, MachineFailed, UserError
from xlstm_mcore.generation.settings import Sampling

CONFIG = {
    "run": {"dir": "runs/x", "steps": 3},
    "model": {"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
    "data": {"path": "data", "seq_len": 8, "global_batch": 4, "micro_batch": 2},
}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins for the modules that do the work; they record how they are called."""
    calls = []

    def put(name: str, function: str = "main", result=0):
        def stand_in(*args, **keys):
            calls.append((args, keys))
            if isinstance(result, BaseException):
                raise result
            return result

        module = types.ModuleType(name)
        setattr(module, function, stand_in)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return put


def test_train_gets_the_config_with_overrides(run_file, fake):
    calls = fake("pretrain.commands.run.train", result=75)
    assert cli.run(["train", run_file, "--run.steps", "7", "--logging.no-tensorboard"]) == 75
    ((config, stop), options) = calls[0]
    assert config.run.steps == 7 and not stop.requested and options == {"take_over": False}
    assert config.logging.tensorboard is False


def test_collections_in_training_leave_out_what_was_imported(run_file, fake):
    fake("pretrain.commands.run.train")
    gc.unfreeze()
    try:
        assert cli.run(["train", run_file]) == 0
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_train_checks_the_number_of_processes_first(run_file, fake, monkeypatch, capsys):
    calls = fake("pretrain.commands.run.train")
    place = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["train", run_file, "--layout.tensor", "2"]) == 2
    assert "3 processes cannot hold layout.tensor=2" in capsys.readouterr().err
    assert calls == []


def test_a_run_is_taken_over_only_where_it_is_asked_for(run_file, fake):
    calls = fake("pretrain.commands.run.train", result=0)
    assert cli.run(["train", run_file, "--take-over"]) == 0
    assert calls[0][1] == {"take_over": True}
    workers = fake("pretrain.commands.run.launch", "launch", result=0)
    assert cli.run(["launch", run_file, "--take-over"]) == 0
    assert workers[-1][0][3] == ["--take-over"]


def test_launch_passes_the_same_words_to_its_workers(run_file, fake):
    calls = fake("pretrain.commands.run.launch", "launch", result=75)
    words = ["launch", run_file, "--nproc", "2", "--optimizer.betas", "0.8", "0.9"]
    assert cli.run([*words, "--model.gate-soft-cap", "none"]) == 75
    ((path, config, nproc, flags), _) = calls[0]
    assert (path, nproc) == (run_file, 2)
    assert config.optimizer.betas == (0.8, 0.9)
    assert flags == ["--optimizer.betas", "0.8", "0.9", "--model.gate_soft_cap", "null"]


def test_check_prints_facts_and_checks_processes(run_file, capsys):
    assert cli.run(["check", run_file, "--nproc", "2", "--no-data"]) == 0
    out = capsys.readouterr().out
    assert "tokens per step   32 (4 rows of 8)" in out
    assert "on 2 processes    2 data parallel replicas" in out
    assert cli.run(["check", run_file, "--nproc", "3"]) == 2


def test_all_mistakes_in_one_message_without_a_traceback(run_file):
    command = [sys.executable, "-m", "pretrain", "launch", run_file, "--run.stepz", "3"]
    result = subprocess.run(
        [*command, "--model.num_heads", "-5"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "did you mean run.steps?" in result.stderr
    assert "model.num_heads='-5' must be greater than 0" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trian"],
        ["launch"],
        ["launch", "run.yaml", "--nprok", "2"],
        ["launch", "run.yaml", "--nproc", "two"],
        ["generate"],
        ["demo", "--model", "huge"],
    ],
)
def test_a_command_line_that_is_not_understood(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(words)
    assert left.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_no_process_at_all_is_refused(run_file, capsys):
    assert cli.run(["launch", run_file, "--nproc", "0"]) == 2
    assert "use 1 or more" in capsys.readouterr().err


def test_user_errors_of_all_packages_become_2(run_file, fake, capsys):
    from xlstm_io.errors import CheckpointError, ShardFormatError

    for error in (UserError("bad"), ShardFormatError("bad"), CheckpointError("bad")):
        fake("pretrain.commands.run.train", result=error)
        assert cli.run(["train", run_file]) == 2
        assert capsys.readouterr().err == "error: bad\n"


def test_an_old_key_is_named_once_by_whoever_reads_it_last(run_file, fake, caplog, monkeypatch):
    """`launch` starts workers, and the first of them names it."""
    monkeypatch.setattr("xlstm_mcore.old_keys._said", set())
    fake("pretrain.commands.run.launch", "launch")
    fake("pretrain.commands.run.train")
    assert cli.run(["launch", run_file, "--model.rope_base", "5"]) == 0
    assert not caplog.records
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.run(["train", run_file, "--model.rope_base", "5"]) == 0
    (record,) = caplog.records
    assert "model.rope_base is read as model.rotary_base" in record.getMessage()


def test_what_a_launcher_says_wrongly_is_found_before_torch_is_imported(
    run_file, fake, monkeypatch, capsys
):
    calls = fake("pretrain.commands.run.train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    assert cli.run(["train", run_file]) == 2
    assert "RANK='2' must be a whole number from 0 to 1" in capsys.readouterr().err
    assert calls == []


def test_a_failing_machine_is_one_message_and_70(run_file, fake, capsys):
    fake("pretrain.commands.run.train", result=MachineFailed("rank 3: the disk is full"))
    assert cli.run(["train", run_file]) == 70
    expected = "error: rank 3: the disk is full; the same command may be repeated\n"
    assert capsys.readouterr().err == expected


def test_whoever_reads_the_output_may_end_first(run_file):
    """As `| head` does: a broken pipe is no broken connection."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "pretrain", "check", run_file, "--no-data"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_stop_before_all_ranks_have_come(run_file, fake, capsys):
    fake("pretrain.commands.run.train", result=Interrupted())
    assert cli.run(["train", run_file]) == 75
    assert "run again to continue" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(run_file, fake):
    fake("pretrain.commands.run.train", result=ValueError("ours"))
    with pytest.raises(ValueError, match="ours"):
        cli.run(["train", run_file])


def test_ctrl_c_outside_of_training(run_file, fake, capsys):
    fake("pretrain.commands.run.train", result=KeyboardInterrupt())
    assert cli.run(["train", run_file]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_generate_arguments(fake):
    calls = fake("pretrain.commands.after_run.generate")
    words = ["generate", "ckpt", "--prompt", "a", "--prompt", "b", "--max-tokens", "5"]
    assert cli.run([*words, "--stop", "x", "--stop", "y", "--out", "x.txt"]) == 0
    args, keys = calls[0]
    assert args == ("ckpt", Sampling(max_tokens=5, stop=("x", "y")))
    assert (keys["prompt"], keys["out"], keys["which"]) == (["a", "b"], "x.txt", None)
    assert cli.run(["generate", "ckpt", "--checkpoint", "best"]) == 0
    args, keys = calls[1]
    assert args == ("ckpt", Sampling()), "the defaults of the options are those of the class"
    assert (keys["prompt"], keys["prompts"], keys["which"]) == (None, None, "best")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature=-1.0 must be 0 (the likeliest token) or above"),
        (["--temperature", "nan"], "--temperature=nan must be 0"),
        (["--top-k", "-3"], "--top-k=-3 must be 0 (all tokens) or above"),
        (["--top-p", "0"], "--top-p=0.0 must be above 0 and at most 1"),
        (["--top-p", "1.5", "--seed", "-1"], "at most 1 (all tokens); --seed=-1 must be 0"),
        (["--max-tokens", "0"], "--max-tokens=0 must be at least 1"),
        (["--num-samples", "0"], "--num-samples=0 must be at least 1"),
        (["--stop", ""], "--stop=('',) must not be empty"),
    ],
)
def test_sampling_without_sense_is_refused(words, message, fake, capsys):
    calls = fake("pretrain.commands.after_run.generate")
    assert cli.run(["generate", "ckpt", *words]) == 2
    assert message in capsys.readouterr().err
    assert not calls


def test_generate_main_takes_what_the_command_passes(fake):
    import inspect

    calls = fake("pretrain.commands.after_run.generate")
    cli.run(["generate", "ckpt"])
    args, keys = calls[0]
    sys.modules.pop("pretrain.commands.after_run.generate")
    from pretrain.commands.after_run.generate import main

    inspect.signature(main).bind(*args, **keys)


def test_show_evaluate_report_demo_reach_their_modules(run_file, fake, capsys):
    fake("pretrain.commands.after_run.show", "show", result="12 tensors")
    assert cli.run(["show", "ckpt"]) == 0
    assert capsys.readouterr().out == "12 tensors\n"
    calls = fake("pretrain.commands.after_run.evaluate")
    assert cli.run(["evaluate", "ckpt", run_file, "--data.path", "other"]) == 0
    assert calls[-1][0][0] == "ckpt"
    assert calls[-1][0][1].data.path == "other"
    known = len(calls)
    words = ["evaluate", "ckpt", run_file, "--evaluation.max-batches", "5", "--data.path", "other"]
    assert cli.run([*words, "--engine.precision", "bf16", "--data.on_corrupt", "quarantine"]) == 2
    said = capsys.readouterr().err
    assert "--evaluation.max_batches, --engine.precision, --data.on_corrupt: evaluate would" in said
    assert "The keys that count are data.path, data.sources, data.valid, " in said
    assert len(calls) == known
    batch = ["--data.micro_batch", "64", "--data.global_batch", "64"]  # one must divide the other
    assert cli.run(["evaluate", "ckpt", run_file, *batch]) == 0
    length = ["--data.seq_len", "41", "--layout.context", "1", "--layout.no-sequence"]
    assert cli.run(["evaluate", "ckpt", run_file, *length]) == 0
    assert calls[-1][0][1].data.seq_len == 41
    assert cli.run(["evaluate", "ckpt", run_file, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--data.micro_batch" in said and "--data.workers" not in said and "--run." not in said
    calls = fake("pretrain.commands.after_run.report")
    assert cli.run(["report", "runs/x", "runs/y", "--baselines", "b.json"]) == 0
    assert calls[-1] == ((["runs/x", "runs/y"],), {"baselines": "b.json"})
    calls = fake("pretrain.commands.run.demo", result=75)
    assert cli.run(["demo", "--model", "classic", "--steps", "20", "--data", "a*"]) == 75
    assert calls[-1][1] == {
        "model": "classic",
        "steps": 20,
        "data": "a*",
        "text_field": "text",
        "vocab_size": 8192,
        "work": "runs/demo",
        "nproc": None,
    }


@pytest.mark.parametrize("command", sorted(cli.COMMANDS) + sorted(cli.CONFIG_COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run([command, "--help"])
    assert left.value.code == 0
    assert f"python -m pretrain {command}" in capsys.readouterr().out


def test_help_with_a_run_file_lists_every_key_with_its_value(run_file, capsys):
    from pretrain.config.schema import FIELDS

    assert cli.run(["train", run_file, "--run.steps", "77", "--help"]) == 0
    out = capsys.readouterr().out
    for key in FIELDS:
        assert f"--{key} " in out
    assert "77" in out


def test_check_prints_what_overlaps_and_every_source(capsys):
    sources = ["data.sources=[{name: a, path: here, weight: 1}, {name: b, path: there, weight: 1}]"]
    words = [f"--{word}" for word in ("data.path=null", *sources)]
    assert cli.run(["check", "pretrain/configs/xlstm_7b.yaml", "--no-data", *words]) == 0
    text = capsys.readouterr().out
    assert "adamw, ZeRO stage 1, overlap_grad_reduce and overlap_param_gather with NCCL" in text
    assert "data              here, there" in text


def test_check_prints_flops_and_the_state(capsys):
    assert cli.run(["check", "pretrain/configs/xlstm_7b.yaml", "--no-data"]) == 0
    text = capsys.readouterr().out
    assert "training FLOPs    4.036e+10 per token" in text
    assert "cell 1.0%" in text
    assert "generation state  134.48 MB per sequence" in text


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ECONNRESET]
)
def test_storage_that_fails_is_one_message(number, monkeypatch, capsys):
    def fails(options):
        raise OSError(number, os.strerror(number), "/mnt/a-file")

    monkeypatch.setitem(cli.COMMANDS, "show", fails)
    assert cli.run(["show", "run"]) == 70
    said = capsys.readouterr().err
    assert "/mnt/a-file" in said and "the same command may be repeated" in said
