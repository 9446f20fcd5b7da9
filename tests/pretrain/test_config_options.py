"""Keys of the run file as command-line options."""

import pytest
import yaml

from pretrain.config import ConfigError, load_config, override_option, split_overrides
from tests.pretrain.run_files import raw


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path / "run.yaml", raw(optimizer__lr=1e-3, layout__tensor=2))
    words = (
        "--optimizer.lr 3e-4 --optimizer.betas 0.8 0.9 --layout.sequence --run.dir 5 "
        "--model.gate-soft-cap none --logging.no-tensorboard --run.steps=7 "
        "--model.igate_bias_init -2.5"
    ).split()
    loaded = load_config(path, words)
    assert loaded.optimizer.lr == 3e-4
    assert loaded.optimizer.betas == (0.8, 0.9)
    assert loaded.layout.sequence is True
    assert loaded.layout.tensor == 2
    assert loaded.run.dir == "5"
    assert loaded.model.gate_soft_cap is None
    assert loaded.logging.tensorboard is False
    assert loaded.run.steps == 7
    assert loaded.model.igate_bias_init == -2.5
    assert load_config(path, {"optimizer.lr": 3e-4}).optimizer.lr == 3e-4


def test_switches_that_may_be_left_open(tmp_path):
    path = write(tmp_path / "run.yaml", raw())
    words = ["--engine.overlap_grad_reduce", "--engine.no-overlap-param-gather"]
    engine = load_config(path, words).engine
    assert (engine.overlap_grad_reduce, engine.overlap_param_gather) == (True, False)
    words = ["--engine.overlap_grad_reduce", "null", "--run.steps", "7"]
    assert load_config(path, words).engine.overlap_grad_reduce is None
    assert load_config(path, override_option("engine.overlap_grad_reduce", None)) == load_config(
        path
    )


def test_problems_of_file_and_command_line_come_together(tmp_path):
    path = write(tmp_path / "run.yaml", raw(optimizer__lr=-1))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--run.stepz", "5", "--data.seq_len", "long"])
    text = str(caught.value)
    assert "3 problems" in text
    assert "run.stepz is not a key of a run file; did you mean run.steps?" in text
    assert "data.seq_len='long'" in text
    assert "optimizer.lr=-1" in text


def test_overrides_are_told_from_other_words():
    rest, found = split_overrides(
        ["--run.steps", "5", "run.yaml", "--nproc", "2", "--layout.sequence", "x.y", "--a.b"]
    )
    assert rest == ["run.yaml", "--nproc", "2", "x.y"]
    assert found == {"run.steps": "5", "layout.sequence": "true", "a.b": ""}


@pytest.mark.parametrize(
    "words", [["--run.steps"], ["--optimizer.betas", "0.9"], ["--run.steps", "--layout.sequence"]]
)
def test_an_option_without_its_value_is_refused(words):
    with pytest.raises(ConfigError, match="needs"):
        split_overrides(words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.betas", ["0.8", "0.9"]),
        ("optimizer.decay", "{norm: true}"),
        ("checkpoint.accept_changes", "run.seed,model.norm_eps"),
        ("model.chunk_size", None),
        ("run.steps", "5"),
        ("memory.recompute", "none"),
        ("engine.offload", "none"),
        ("model.head_norm", "none"),
    ],
)
def test_override_option_is_the_inverse(key, value):
    assert split_overrides(override_option(key, value)) == ([], {key: value})


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["--optimizer.decay", "{norm: true, bias: false}"], "optimizer", "decay", None),
        (["--optimizer.decay={norm: true, bias: false}"], "optimizer", "decay", None),
        (["--optimizer.betas", "[0.8,", "0.9]"], "optimizer", "betas", (0.8, 0.9)),
        (["--optimizer.decay", "{norm:", "true}"], "optimizer", "decay", {"norm": True}),
        (["--optimizer.betas", "[0.8, 0.9]"], "optimizer", "betas", (0.8, 0.9)),
        (["--optimizer.betas=0.8,0.9"], "optimizer", "betas", (0.8, 0.9)),
        (["--checkpoint.accept_changes", "a.b,c"], "checkpoint", "accept_changes", ["a.b", "c"]),
        (["--checkpoint.accept_changes", "[a.b, c]"], "checkpoint", "accept_changes", ["a.b", "c"]),
    ],
)
def test_lists_and_mappings_are_written_as_in_the_file(tmp_path, words, section, key, value):
    loaded = load_config(write(tmp_path / "run.yaml", raw()), [*words, "--run.steps", "7"])
    wanted = {"norm": True, "bias": False} if value is None else value
    assert getattr(getattr(loaded, section), key) == wanted
    assert loaded.run.steps == 7


def test_a_key_of_a_section_inside_a_section_is_an_option_too(tmp_path):
    path = write(tmp_path / "run.yaml", raw(logging__profile={"from_step": 9, "steps": 2}))
    words = "--logging.profile.from-step 4 --guard.spikes.policy=skip --guard.spikes.z_loss 7"
    loaded = load_config(path, words.split())
    assert (loaded.logging.profile.from_step, loaded.logging.profile.steps) == (4, 2)
    assert (loaded.guard.spikes.policy, loaded.guard.spikes.z_loss) == ("skip", 7.0)
    words = ["--logging.profile", "{steps: 5}", "--logging.profile.from_step", "3"]
    profile = load_config(path, words).logging.profile
    assert (profile.from_step, profile.steps) == (3, 5)
    profile = load_config(path, ["--logging.profile.from_step", "null"]).logging.profile
    assert (profile.from_step, profile.steps) == (None, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guard.spikes.polizy skip", "guard.spikes has no polizy; its keys are policy, window"),
        ("--guard.spikes.policy 1", "guard.spikes.policy='1' must be"),
        ("--guard.spikes.policy.x 1", "guard.spikes has no policy.x"),
        ("--run.steps.x 1", "run.steps={'x': '1'} must be"),
        ("--run.stepz.x 1", "run.stepz is not a key of a run file"),
    ],
)
def test_a_wrong_key_inside_a_section_is_named(tmp_path, words, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "run.yaml", raw()), words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guard.spikes.policy", "skip"),
        ("optimizer.decay", {"norm": True}),
        ("data.batch_ramp", [{"steps": 2, "global_batch": 4}]),
        ("checkpoint.accept_changes", ["run.seed", "model"]),
        ("optimizer.betas", (0.8, 0.9)),
    ],
)
def test_values_reach_a_worker_as_they_are(tmp_path, key, value):
    path = write(tmp_path / "run.yaml", raw())
    assert load_config(path, override_option(key, value)) == load_config(path, {key: value})


def test_lists_on_the_command_line(tmp_path):
    path = write(tmp_path / "run.yaml", raw())
    loaded = load_config(path, ["--data.batch_ramp", "[{steps: 2, global_batch: 4}]"])
    assert loaded.data.ramp.sizes == [4, 16]
    with pytest.raises(ConfigError, match=r"data.batch_ramp='\{' must be a list"):
        load_config(path, ["--data.batch_ramp", "{"])
