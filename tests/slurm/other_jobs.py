"""Scenarios of jobs around a run: preparing its data, evaluating its checkpoints."""

import json
import sys

import yaml

from tests.slurm.runs import ROOT, said, scenario, site


@scenario
def an_array_prepares_what_one_process_does(make):
    """One element is stopped and goes on, another is killed, which a second submission repairs."""
    run = make("prep", nodes=2)
    python = run.folder / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
*"--task 0") mkdir "{run.folder}/stopped" && exit 75;;
*"--task 1") mkdir "{run.folder}/killed" && kill -KILL $$;;
esac
exec {sys.executable} "$@"
"""
    )
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    site_file = {**run.site, "env": {"PYTHONPATH": paths}}
    (run.folder / "site.yaml").write_text(yaml.safe_dump(site_file))
    values = {
        "input": [str(make.shards.parent / "corpus.jsonl")],
        "tokenizer": str(make.shards.parent / "tok"),
        "out": str(run.folder / "shards"),
        "seq_len": 16,
        "valid_fraction": 0.2,
        "shard_mb": 0.004,
        "workers": 1,
    }
    (run.folder / "build.yaml").write_text(yaml.safe_dump(values))
    words = ("submit", "prep", run.folder / "build.yaml", "--nodes", 2, *site(run))
    array, merge = said(run, *words).split()
    # The merge never can start, and does not wait for ever.
    assert run.cluster.wait_for_end(merge, seconds=200) == {merge: "CANCELLED"}
    run.cluster.wait_for(lambda: ended(run, array), 200, "the array does not end")
    stopped, killed = (run.cluster.job(f"{array}_{number}") for number in (0, 1))
    assert (stopped["JobState"], stopped["Restarts"]) == ("COMPLETED", "1")
    assert (killed["JobState"], killed["Restarts"]) == ("FAILED", "0")
    array, merge = said(run, *words).split()
    assert run.cluster.wait_for_end(merge, seconds=200) == {merge: "COMPLETED"}
    for path in sorted(make.shards.glob("*/*/*.tar")):
        assert (run.folder / "shards" / path.relative_to(make.shards)).read_bytes() == (
            path.read_bytes()
        )


@scenario
def every_checkpoint_is_evaluated_as_it_comes(make):
    run = make("each", steps=150)
    words = ("submit", "evaluate", run.run, "--every-checkpoint", 0.05, *site(run))
    job = said(run, *words).strip()  # there is none yet
    assert run.submit().until_ended() == "COMPLETED"
    assert run.cluster.wait_for_end(job) == {job: "COMPLETED"}
    results = sorted((run.run / "evaluations").iterdir())
    assert [path.stem for path in results] == sorted(
        path.name for path in (run.run / "checkpoints").iterdir()
    )
    assert len(results) == 15 and json.loads(results[0].read_text())["loss"] == 1.5
    assert int(run.cluster.job(job)["Restarts"]) > 0  # it waited in the queue


def ended(run, job):
    """Whether nothing of an array is in the queue."""
    return not run.cluster.run("squeue", "-h", "-j", job, check=False).stdout.strip()
