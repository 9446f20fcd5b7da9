"""What a run does about a step whose update was rejected."""

from pretrain.config import RunConfig
from pretrain.engines.verdict import StepResult
from xlstm_io.errors import ExitCode, UserError
from xlstm_io.storage import Location


class DivergedError(UserError):
    """Loss or gradient stopped being finite, and the run is configured to stop then."""

    exit_code = ExitCode.DIVERGED


def diverged(config: RunConfig, step: int, result: StepResult, good: Location | None) -> str:
    """What to tell the user when a step's update was rejected and the run stops.

    Args:
        config: the run.
        step: the step.
        result: what was found.
        good: the newest complete checkpoint.
    """
    options = config.optimizer
    remedy = f"lower optimizer.lr={options.lr}"
    if options.clip_grad == 0:
        remedy += ", or clip gradients: optimizer.clip_grad=0 never does"
    return (
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: "
        "not finite, so the update was not applied and the run stops "
        "(guard.stop_on_nonfinite=true); "
        f"{f'{good} is from before' if good else 'there is no checkpoint yet'}; {remedy}"
    )
