"""The command line `python -m pretrain`: the commands around a training run.

Each command is thin: it reads its arguments and calls the module that does the work, imported
only then, so that `check` and every error in a config answer without loading torch. `run` is the
one place where an error becomes an exit code.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.commands.after_run import copies, downstream
from pretrain.commands.before_run import plan, rehearse, self_test
from pretrain.commands.run.fresh import start_anew
from pretrain.config import (
    RunConfig,
    check_world,
    config_of_checkpoint,
    load_config,
    override_option,
    split_overrides,
)
from pretrain.options import (
    OVERRIDES_HELP,
    add_checkpoint,
    add_demo,
    add_evaluation,
    add_generation,
    add_report,
    add_rewind,
    check_evaluation_keys,
    overrides_help,
)
from pretrain.processes.devices import set_device_defaults
from pretrain.processes.environment import read_place
from pretrain.processes.slurm_ranks import adopt_ranks, check_one_node
from pretrain.supervision.ending import end_with
from pretrain.supervision.lease import check_free
from xlstm_io.allocator import keep_freed_memory
from xlstm_io.errors import (
    ConfigError,
    ExitCode,
    Interrupted,
    MachineFailed,
    Superseded,
    UserError,
    exit_code_of,
    is_machine_failure,
)
from xlstm_io.signals import STOP_SIGNALS, StopSignal, signal_at_parents_death
from xlstm_io.terminal import say, tell, until_nobody_reads


def _config_help(command: str, path: str, overrides: list[str]) -> None:
    """Print the keys of a run file as options, with the values of this file and command line."""
    config = load_config(path, overrides)
    print(f"usage: python -m pretrain {command} {path} [--section.key VALUE ...]\n")
    print(overrides_help(command, config))


def _add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    text = "run file, see pretrain/configs/"
    if optional:
        text += " (default: the configuration in the checkpoint)"
    nargs = "?" if optional else None
    parser.add_argument("config", metavar="RUN.yaml", nargs=nargs, help=text)
    parser.epilog = parser.epilog or OVERRIDES_HELP


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Pretrain xLSTM language models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, allow_abbrev=False)

    launch = add("launch", "check a run and train it with several processes on this machine")
    _add_config(launch)
    launch.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes to start (default: one replica, tensor x pipeline x context)",
    )
    train = add("train", "what torchrun and srun start: one process of a run")
    _add_config(train)
    for command in (launch, train):
        command.add_argument(
            "--take-over",
            action="store_true",
            help="take the run from a process that may be at work on it, which then ends",
        )
        command.add_argument(
            "--fresh",
            action="store_true",
            help="start at step 0; the run folder that is there is renamed",
        )
    check = add(
        "check", "check a run file and what it needs on this machine; print what it would train"
    )
    _add_config(check)
    check.add_argument(
        "--no-data",
        action="store_true",
        help="look at the run file alone, not at data, disk and run folder",
    )
    check.add_argument("--nproc", type=int, metavar="N", help="processes that the layout must fit")

    for name, command, help in (
        ("rehearse", rehearse, "play ranks of a large run without a GPU, and compare them"),
        ("plan", plan, "find the layouts that fit a number of GPUs, the fastest first"),
        (
            "self-test",
            self_test,
            "train a few steps to prove a resume here, or with --layout a layout",
        ),
    ):
        parser_of = add(name, help)
        _add_config(parser_of)
        command.add_arguments(parser_of)

    show = add("show", "print what a checkpoint holds")
    add_checkpoint(show)

    generate = add("generate", "continue texts with a trained model")
    add_checkpoint(generate)
    add_generation(generate)

    evaluate = add("evaluate", "loss of a checkpoint on a validation split")
    add_evaluation(evaluate)
    _add_config(evaluate, optional=True)

    downstream.add_arguments(add("downstream", "tasks of lm-evaluation-harness on a checkpoint"))

    for name, help in copies.HELP.items():
        copies.add_arguments(name, add(name, help))

    add_report(add("report", "summary of a run: losses, speed, memory, where things lie"))
    add_rewind(add("rewind", "take a run back to a checkpoint, and leave out the samples after it"))
    add_demo(add("demo", "the whole pipeline, from text to a trained model and a summary"))
    return parser


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _import_megatron(config: RunConfig) -> None:
    """Import what a rank needs in half the time; see `xlstm_mcore.megatron.first_import`."""
    set_device_defaults(config.layout.tensor)  # torch may read them when it is imported
    from xlstm_mcore.megatron.first_import import import_megatron

    import_megatron()


def _train(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    keep_freed_memory()  # before there are threads
    # Heard from here on: the imports take seconds, and minutes on a busy file system. A launcher
    # may have blocked the signals until somebody listens.
    with StopSignal(announce=int(os.environ.get("RANK", "0")) == 0) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun leaves its workers behind
            signal_at_parents_death(signal.SIGTERM)
        place = read_place()
        check_world(config, 1 if place is None else place.world_size)
        if options.fresh and (place is None or place.rank == 0):
            start_anew(config, options.config, take_over=options.take_over)
        from xlstm_mcore.megatron.first_import import no_collections

        with no_collections():
            _import_megatron(config)
            from pretrain.commands.run.train import main
        # Python's full collections walk all objects, and imports are 200,000 of them: one
        # would hold up a step for 0.2 s, and with it all ranks. These stay until the end.
        gc.freeze()
        return main(config, stop, take_over=options.take_over)


def _launch(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    from pretrain.commands.run.launch import launch

    check_one_node("launch")
    words = [*overrides, *(["--take-over"] if options.take_over else [])]
    if not options.take_over:
        check_free(Path(config.run.dir))  # before the logs of the life in there are overwritten

    def before() -> None:
        if options.fresh:
            start_anew(config, options.config, take_over=options.take_over)

    return launch(options.config, config, _positive_nproc(options), words, before=before)


def _check(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    from pretrain.commands.before_run.check import describe_run

    nproc = _positive_nproc(options)
    if nproc is not None:
        check_world(config, nproc)
    say(describe_run(config, nproc))
    if not options.no_data:
        from pretrain.commands.before_run.check_data import describe_data

        say(describe_data(config))
    return ExitCode.DONE


def _evaluate(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> int:
    check_evaluation_keys(split_overrides(overrides)[1])
    _import_megatron(config)
    from pretrain.commands.after_run.evaluate import main

    asked = _given(options, "which", "by", "times")
    return main(options.checkpoint, config, as_json=options.json, **asked)


def _show(options: argparse.Namespace) -> int:
    from pretrain.commands.after_run.show import show

    say(show(options.checkpoint, options.which))
    return ExitCode.DONE


def _generate(options: argparse.Namespace) -> int:
    from xlstm_mcore.generation.settings import Sampling

    # Before torch is loaded, which takes seconds: it says what is wrong with the options.
    sampling = Sampling(
        stop=tuple(options.stop),
        **_given(options, "max_tokens", "temperature", "top_k", "top_p", "seed", "num_samples"),
    )
    from pretrain.commands.after_run.generate import main

    return main(
        options.checkpoint,
        sampling,
        as_json=options.json,
        **_given(options, "which", "prompt", "prompts", "batch", "precision", "tokenizer", "out"),
    )


def _report(options: argparse.Namespace) -> int:
    from pretrain.commands.after_run.report import main

    return main(options.run_dirs, baselines=options.baselines)


def _rewind(options: argparse.Namespace) -> int:
    from pretrain.commands.after_run.rewind import main

    return main(options.run_dir, options.to, options.skip_samples)


def _demo(options: argparse.Namespace) -> int:
    from pretrain.commands.run.demo import main

    names = ("model", "steps", "data", "text_field", "vocab_size", "work", "nproc")
    return main(**_given(options, *names))


# Commands that read a run file and take its keys as options, and the others.
CONFIG_COMMANDS: dict[str, Callable[[argparse.Namespace, RunConfig, list[str]], int]] = {
    "train": _train,
    "launch": _launch,
    "self-test": self_test.run,
    "check": _check,
    "rehearse": rehearse.run,
    "plan": plan.run,
    "evaluate": _evaluate,
}
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": _show,
    "generate": _generate,
    "downstream": downstream.run,
    **dict.fromkeys(copies.HELP, copies.run),
    "report": _report,
    "rewind": _rewind,
    "demo": _demo,
}
# Commands that several processes run together, each as one rank.
RANK_COMMANDS = ("train", "self-test", "evaluate", "generate", "downstream")


def _positive_nproc(options: argparse.Namespace) -> int | None:
    if options.nproc is not None and options.nproc < 1:
        raise ConfigError(f"--nproc={options.nproc} starts no process; use 1 or more")
    return options.nproc


def _saved_config(checkpoint: str, which: str | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration in a checkpoint; see `xlstm_io.checkpoint.choose` for which one."""
    from xlstm_io.checkpoint.choose import choose
    from xlstm_io.checkpoint.manifest import read_manifest

    path = choose(checkpoint, which)
    return config_of_checkpoint(read_manifest(path).config, overrides, str(path))


def _dispatch(argv: Sequence[str]) -> int:
    """Parse and run one command; errors travel up to `run`."""
    words = list(argv)
    if words and words[0] in RANK_COMMANDS:
        adopt_ranks()
    parser = _build_parser()
    if not words or words[0] not in CONFIG_COMMANDS:
        options = parser.parse_args(words)
        return COMMANDS[options.command](options)
    asked_help = [word for word in words if word in ("-h", "--help")]
    words, overrides = split_overrides([word for word in words if word not in asked_help])
    flags = [text for key, value in overrides.items() for text in override_option(key, value)]
    if asked_help:
        files = [word for word in words[1:] if word.endswith((".yaml", ".yml"))]
        if not files:
            parser.parse_args([words[0], "--help"])  # ends here
        _config_help(words[0], files[0], flags)
        return ExitCode.DONE
    options = parser.parse_args(words)
    # Workers that this command starts read the file again, and the first of them says what is old.
    starts_workers = words[0] in ("launch", "self-test") and "WORLD_SIZE" not in os.environ
    if options.config is None:
        config = _saved_config(options.checkpoint, options.which, overrides)
    else:
        config = load_config(options.config, overrides, quiet=starts_workers)
    return CONFIG_COMMANDS[options.command](options, config, flags)


def run(argv: Sequence[str]) -> int:
    """Run a command; returns its exit code.

    A user's mistake becomes one message on stderr and exit code 2. Any other exception is a bug of
    ours: it keeps its traceback, and Python's exit code 1.
    """
    try:
        return _dispatch(argv)
    except UserError as error:
        tell(f"error: {error}")
        return exit_code_of(error)
    except Superseded as error:
        tell(f"superseded: {error}")
        return ExitCode.SUPERSEDED
    except MachineFailed as error:
        tell(f"error: {error}; the same command may be repeated")
        return ExitCode.MACHINE_FAILED
    except BrokenPipeError:  # `| head`: see `until_nobody_reads`
        raise
    except OSError as error:
        if not is_machine_failure(error):
            raise
        tell(f"error: {error}; the same command may be repeated")
        return ExitCode.MACHINE_FAILED
    except Interrupted:
        print("stopped before all ranks had come; run again to continue", file=sys.stderr)
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.SECOND_INTERRUPT


def main() -> None:
    """Console entry point."""
    end_with(lambda: until_nobody_reads(lambda: run(sys.argv[1:])))
