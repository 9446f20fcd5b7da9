"""What a run says when it changes by plan: at the step where it does, once, and on one rank."""

from types import SimpleNamespace

from pretrain.lr_curve import Curve, Turn
from pretrain.watching.history import read_history
from pretrain.watching.milestones import MilestoneWatcher, milestones
from tests.pretrain.run_files import config

RUN = config(
    run__steps=100,
    data__path=None,
    data__sources=[{"name": name, "path": name, "weight": 1} for name in "ab"],
    data__batch_ramp=[{"steps": 10, "global_batch": 8}, {"steps": 5, "global_batch": 12}],
    data__phases=[{"from_sample": 156, "weights": {"a": 3, "b": 1}}],
    schedule__name="wsd",
    schedule__warmup_steps=4,
    schedule__cooldown_steps=20,
    optimizer__lr=1e-3,
)


def test_each_change_is_told_at_its_first_step():
    """140 samples are in the first 15 steps, and 16 in the next."""
    assert milestones(RUN, Curve(100)) == {
        5: [("warmup", "over, and the learning rate is 0.001")],
        11: [("batch ramp", "12 rows per step")],
        16: [("batch ramp", "16 rows per step")],
        17: [("data phase", "from sample 156 on a 75%, b 25%")],
        81: [("cooldown", "the learning rate goes from 0.001 to 0 until step 100")],
    }


def test_a_phase_comes_earlier_when_samples_were_left_out():
    assert milestones(RUN, Curve(100), moved=40)[14] == [
        ("data phase", "from sample 156 on a 75%, b 25%")
    ]


def test_a_stretched_curve_cools_down_later():
    """From step 50 on the curve of 100 steps takes 200."""
    longer = config(
        run__steps=250, schedule__name="wsd", schedule__cooldown_steps=20, schedule__warmup_steps=0
    )
    found = milestones(longer, Curve(100, (Turn(50, 100, 0.25),)))
    assert [kind for kind, _ in found[171]] == ["cooldown"] and len(found) == 1


def test_one_rank_tells_and_keeps_it(tmp_path):
    run = config(run__dir=str(tmp_path), schedule__warmup_steps=6, optimizer__lr=1e-3)
    said = []
    metrics = SimpleNamespace(message=said.append)
    start = SimpleNamespace(
        curve=Curve(100),
        cursor=SimpleNamespace(consumed_samples=32),
        state=SimpleNamespace(step=2),
    )
    for main in (True, False):
        watcher = MilestoneWatcher(run, SimpleNamespace(is_main=main), start, life=2)
        assert [step for step in range(20) if watcher.due(step)] == [7]
        watcher.tell(SimpleNamespace(step=7), metrics)
    words = "over, and the learning rate is 0.001"
    assert said == [f"step 7: warmup: {words}"]
    (line,) = read_history(tmp_path)
    assert (line["event"], line["step"], line["reason"]) == ("warmup", 7, words)
