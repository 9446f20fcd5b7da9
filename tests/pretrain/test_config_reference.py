"""docs/configuration.md and `--help` say what the schema says."""

import re
from pathlib import Path

from pretrain.config import reference
from pretrain.config.schema import FIELDS
from tests.pretrain.run_files import config

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_document_is_current():
    """To renew it: python -m pretrain.config.reference > docs/configuration.md."""
    assert DOCUMENT.read_text(encoding="utf-8") == reference.markdown()


def test_every_key_has_a_help_text():
    assert {f"{name}.{key.name}" for name, _, keys in reference.sections() for key in keys} >= set(
        FIELDS
    )
    for name, purpose, keys in reference.sections():
        assert purpose, name
        for key in keys:
            assert key.help, f"{name}.{key.name}"
            assert "\n" not in key.help
            assert not re.search(r"^the same|as above", key.help), "a message shows it alone"


def test_types_and_defaults_are_written_as_in_a_run_file():
    text = reference.markdown()
    for row in (
        "| `steps` | `integer > 0` | **required** |",
        "| `norm` | `rmsnorm or layernorm` | `rmsnorm` |",
        "| `betas` | `[number >= 0 and < 1, number >= 0 and < 1]` | `[0.9, 0.95]` |",
        "| `chunk_size` | `integer > 0 or null` | `null` |",
        "| `batch_ramp` | `list of {steps, global_batch}` | `[]` |",
        "| `weights` | `{name: number > 0}` | **required** |",
    ):
        assert row in text


def test_help_shows_the_values_of_the_run():
    text = reference.options_help(config(run__steps=77, optimizer__decay={"norm": True}))
    assert "--run.steps  integer > 0" in text and "(now 77)" in text
    assert "(now {norm: true})" in text
