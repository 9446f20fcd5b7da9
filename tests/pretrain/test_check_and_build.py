"""What `check` accepts can be built and takes its first step, on every layout.

In CI these are 150 run files by seed; by command more, and one alone by its seed:

    python -m pytest tests/pretrain/test_check_and_build.py --random-runs 2000
    python -m tests.pretrain.test_check_and_build 17
"""

import sys
import traceback

from pretrain.commands.before_run.check import describe_run
from pretrain.config import check_world, config_from_dict
from tests.pretrain.random_runs import draw, first_step
from xlstm_io.errors import ConfigError


def try_run(seed: int) -> bool | str:
    """Whether `check` accepts the run file of a seed; the traceback if it does and should not."""
    raw, processes, rank = draw(seed)
    try:
        try:
            config = config_from_dict(raw)
            check_world(config, processes)
        except ConfigError:
            return False
        describe_run(config, processes)
        first_step(config, rank, processes)
    except Exception:
        return traceback.format_exc()
    return True


def test_what_check_accepts_is_built_and_takes_its_first_step(request):
    results = {seed: try_run(seed) for seed in range(request.config.getoption("--random-runs"))}
    found = {seed: text for seed, text in results.items() if isinstance(text, str)}
    words = [f"{seed}: {text.strip().splitlines()[-1]}" for seed, text in found.items()]
    assert not found, "\n".join([f"{len(found)} seeds:", *words])
    accepted = sum(result is True for result in results.values())
    assert accepted > len(results) / 3, "too few sound run files to find anything"


if __name__ == "__main__":
    print(draw(int(sys.argv[1])))
    print(try_run(int(sys.argv[1])))
