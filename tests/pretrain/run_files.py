"""A small run file for tests of the configuration, with single keys changed."""

import pytest

from pretrain.config import ConfigError, RunConfig, config_from_dict


def raw(**changes) -> dict:
    """A valid run file as nested dicts; `model__num_heads=3` changes one key."""
    values = {
        "run": {"dir": "runs/x", "steps": 100},
        "model": {"pattern": "MMMM", "hidden_size": 128, "num_heads": 4, "vocab_size": 8192},
        "data": {"path": "data", "seq_len": 256, "global_batch": 16, "micro_batch": 4},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def message(**changes) -> str:
    """What is said about the run file with these changes."""
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw(**changes))
    return str(caught.value)


def config(**changes) -> RunConfig:
    """The run file with these changes, read."""
    return config_from_dict(raw(**changes))
