"""Tests on a throwaway Slurm cluster; the modules with scenarios assert too."""

import pytest

pytest.register_assert_rewrite(*(f"tests.slurm.{name}" for name in ("policy", "runs", "training")))
