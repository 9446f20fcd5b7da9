"""Scenarios of long runs: deaths drawn one after another, and the rarer ones with real training."""

import random

from tests.slurm.runs import alone, by_command, launched, needs_root, said
from tests.slurm.training import STEPS, kill_rank

DEATHS = 20


def signalled(run):
    run.cluster.run("scancel", "--signal=USR1", run.job)


def killed(run):
    kill_rank(run, 0)


def requeued(run):
    run.cluster.run("scontrol", "requeue", run.job)


def held(run):
    """Somebody holds the job, and somebody else lets it go on."""
    run.cluster.run("scontrol", "requeuehold", run.job)
    run.wait(lambda run: "held" in run.cluster.job(run.job).get("Reason", ""), 60, "not held")
    assert run.command("resume", run.run) == 0


def crashed(run):
    (node,) = run.lives[-1].nodes
    run.cluster.crash(node)
    run.wait(lambda run: run.state == "PENDING", 120, "the node is not taken for lost")
    run.cluster.start_node(node)


def orphaned(run):
    """The controller dies in the middle of it all, and the life goes on and is then signalled."""
    run.cluster.kill_controller()
    run.cluster.start_controller()
    run.wait(lambda run: run.state == "RUNNING", 60, "the controller does not come back")
    signalled(run)


SAVING, LOSING = (signalled, orphaned), (killed, requeued, held, crashed)


@alone
@needs_root
@by_command
def a_run_outlives_every_death_in_a_row(make):
    """Weeks of a run in minutes: no life is forgotten, and no step but those since a checkpoint."""
    drawn = random.Random(17)
    site = {"partition": "crash", "restarts": {"total": 1000}}
    run = make("weeks", nodes=1, steps=30_000, site=site).submit()
    deaths = [drawn.choice([*SAVING, *LOSING]) for _ in range(DEATHS)]
    lost = []
    run.until_running()
    for number, death in enumerate(deaths, start=1):
        run.until_running(life=number, step=run.lives[-1].start_step + 12)
        death(run)
        run.until_running(life=number + 1, step=1)
        before, after = run.lives[number - 1], run.lives[number]
        lost.append(before.last_step - after.start_step)
        assert after.start_step > before.start_step, (death.__name__, run.log())
        assert before.cause in ("interrupted", "node lost"), (death.__name__, run.log())
        assert lost[-1] == 0 if death in SAVING else lost[-1] <= 10, (death.__name__, lost)
    assert run.command("stop", run.run) == 0 and run.until_ended() == "COMPLETED"
    assert len(run.lives) == DEATHS + 1 and run.files.load().excluded == {}
    print([(death.__name__, steps) for death, steps in zip(deaths, lost, strict=True)])
    print(said(run, "status", run.run))


@needs_root
@by_command
def a_preemption_and_a_node_that_is_cut_off_change_no_loss(make):
    """The ranks of the node that is cut off train on beside their successors until it is back."""
    keys = {**STEPS, "run__steps": 300}
    site = {"partition": "low", "tasks_per_node": 2, "exclusive": True}
    run = make.trainer("rare", nodes=1, site=site, **keys).submit()
    run.until_running(step=12)
    run.cluster.run("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    run.until_running(life=2, step=20)
    assert run.command("stop", run.run) == 0 and run.until_ended() == "COMPLETED", run.log()
    assert run.repeated == 0
    run.submit("--set", "partition=cut").until_running(life=3, step=40)
    (node,) = run.lives[-1].nodes
    run.cluster.cut(node)
    run.wait(lambda run: len(run.lives) == 4, 300, "no new life")
    run.until_running(life=4, step=run.lives[-1].start_step + 1)
    run.cluster.heal(node)
    assert run.until_ended() == "COMPLETED", run.log()
    assert len(run.lives) == 4 and run.causes[-1] == "done", run.log()
    print(f"steps repeated: {run.repeated}; it went on from {run.lives[-1].start_step}")
    assert run.steps == launched(run)
