"""A plan as the text of a batch file.

Every value is quoted for the shell when it is printed, by the environment itself and not by the
templates, so that none can be forgotten. Only the lines of `setup` are shell code and stay as they
are. The templates have no logic but `if` and `for`.
"""

import shlex
from pathlib import Path
from typing import Any

import jinja2

from slurm.batch_files.plan import JobPlan
from xlstm_io.errors import ConfigError
from xlstm_io.remote import masked

TEMPLATES = Path(__file__).with_name("templates")


class _Code(str):
    """A line of shell code, which is not quoted."""


def _quoted(value: Any) -> str:
    return value if isinstance(value, _Code) else shlex.quote(str(value))


def render(plan: JobPlan) -> str:
    """The batch file of a plan.

    Raises:
        ConfigError: it would have a URL with credentials, which others could read in it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["code"] = _Code
    text = environment.get_template(plan.template).render(plan=plan)
    for line in text.splitlines():
        if masked(line) != line:
            raise ConfigError(
                f"the batch file would have a URL with credentials ({masked(line).strip()}), and "
                "others can read that file; give them in the environment, or in the configuration "
                "of the storage's own package"
            )
    return text
