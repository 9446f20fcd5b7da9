"""Site files: every key changes the job or is refused, and what is wrong is one message."""

import pytest

from slurm.batch_files.render import render
from slurm.batch_files.site import (
    Site,
    SiteError,
    load_site,
    site_from_dict,
    time_limit_seconds,
)
from tests.slurm.plans import plan

CHANGES = {
    "partition": "other",
    "name": None,  # for people; nothing depends on it
    "account": "a",
    "qos": "q",
    "reservation": "r",
    "constraint": "c",
    "time": "1:00:00",
    "mail": "x@example.org",
    "nice": 5,
    "gpus_per_node": 2,
    "tasks_per_node": 4,
    "gres": "refused",
    "cpus_per_task": 3,
    "mem": "0",
    "exclusive": False,
    "modules": ["m"],
    "setup": ["true"],
    "python": "/other/python",
    "env": {"A": "b"},
    "scratch": "/local",
    "requeue": "never",
    "extra_sbatch": ["--comment=x"],
    "container": {"kind": "pyxis", "image": "i"},
    "network": {"interface": "ib0"},
    "signal": {"seconds": 900},
    "stage": "needs a disk to copy to",
    "restarts": {"total": 7},
    "health": {"preflight": True},
}


@pytest.mark.parametrize("key", Site.model_fields)
def test_every_key_of_the_site_changes_the_job_or_is_refused(key):
    value = CHANGES[key]
    if value == "refused":
        with pytest.raises(SiteError, match=f"{key}=refused"):
            plan(**{key: value})
    elif key == "stage":
        with pytest.raises(SiteError, match="set scratch, a folder on it"):
            plan(stage={"data": True})
        staged = plan(scratch="/local", stage={"data": True})
        assert staged.staging and plan(scratch="/local").staging is None
    elif value is not None:
        assert plan(**{key: value}) != plan()


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("container", {"mounts": ["/a:/b"], "workdir": "/w", "flags": ["--x"], "python": "p"}),
        ("network", {"env": {"A": "b"}}),
        ("signal", {"name": "USR2"}),
        ("restarts", {"without_progress": 5, "wait_minutes": [2], "max_excluded": 9}),
    ],
)
@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_every_key_of_a_section_changes_the_job(section, keys, kind):
    base = {"kind": kind, "image": "i"}
    before = plan(container=base)
    for key, value in keys.items():
        changed = {"container": base}
        changed[section] = {**changed.get(section, {}), key: value}
        assert plan(**changed) != before, key


def test_every_key_of_the_preflight_reaches_it():
    keys = {
        "command": "true",
        "min_gemm_tflops": 1.0,
        "min_allreduce_gbs": 2.0,
        "max_clock_skew_s": 3.0,
        "min_free_gb": {"run": 4.0, "scratch": 5.0},
    }
    before = plan(health={"preflight": True})
    assert "-m slurm.job.preflight" in render(before) and "slurm.job.preflight" not in render(
        plan()
    )
    for key, value in keys.items():
        assert plan(health={"preflight": True, key: value}).health != before.health


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "partition is missing; set it"),
        ({"partition": "x", "partion": 1}, "partion is not a key .*did you mean partition"),
        ({"partition": "x", "time": "soon"}, "time='soon' must be one of Slurm's times"),
        ({"partition": "x", "time": 43200}, 'must be in quotes, as "12:00:00"'),
        ({"partition": "x", "mem": 0}, "mem=0 must be text; put it into quotes"),
        ({"partition": "x", "container": {"kin": "pyxis"}}, "did you mean kind"),
        ({"partition": "x", "container": {"kind": "docker"}}, "container.kind='docker' must be"),
        ({"partition": "x", "extra_sbatch": ["-p y"]}, "must be an option of sbatch"),
        ({"partition": "x", "env": {"a b": "c"}}, "not a name of a variable"),
        ({"partition": "a\nb"}, "must be one line"),
    ],
)
def test_a_bad_site_is_one_message(raw, message):
    with pytest.raises(SiteError, match=message):
        site_from_dict(raw, "site.yaml")


def test_all_problems_of_a_site_come_at_once():
    with pytest.raises(SiteError) as error:
        site_from_dict({"time": "x", "nodes": 3}, "site.yaml")
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:30:00", 5400), ("2-12", 216000), ("1-0:0:30", 86430)],
)
def test_times_of_slurm(text, seconds):
    assert time_limit_seconds(text) == seconds


def test_a_key_that_takes_text_takes_what_looks_like_a_number(tmp_path):
    """YAML reads 2:00 as 120, and quotes do not come through the shell."""
    path = tmp_path / "site.yaml"
    path.write_text("partition: main\n")
    words = ["time=12:00:00", "mem=0", "account=7", "env.OMP_NUM_THREADS=4", "nice=5"]
    words += ["signal.seconds=300", "health.min_gemm_tflops=2", "network.env.A=1", "exclusive=no"]
    site = load_site(str(path), words)
    assert (site.time, site.mem, site.account, site.nice) == ("12:00:00", "0", "7", 5)
    assert site.env == {"OMP_NUM_THREADS": "4"} and site.network.env == {"A": "1"}
    assert (site.signal.seconds, site.health.min_gemm_tflops) == (300, 2.0)
    assert site.exclusive is False
    with pytest.raises(SiteError, match="nope is not a key"):
        load_site(str(path), ["nope=1"])
