"""Jobs of a study: SLURM arrays and JobSets as a scheduler would read them."""

import os
import subprocess
from pathlib import Path

import pytest

from scaling_perception.scaling.study import Cell, in_order, stages
from scaling_perception.scaling.study_jobs import write_jobs
from scaling_perception.support.errors import UserError

A = Cell("a", "train", ("--config", "x"))
B = Cell("b", "train", ("--config", "x:init={a}"))
C = Cell("eval/b", "evaluate", ("--task", "depth", "--model", "{b}"))
D = Cell("d", "train", ("--config", "y"))


def test_jobs_are_written_by_stage(tmp_path):
    grid = stages(in_order([A, B, C, D], "here"))
    paths = write_jobs("slurm", "it's.py:x=1", tmp_path / "My Study", tmp_path / "jobs", grid)
    assert [path.name for path in paths] == ["stage0.sbatch", "stage1.sbatch", "stage2.sbatch", "submit.sh"]
    for path in paths:
        subprocess.run(["bash", "-n", path], check=True)
    first = paths[0].read_text()
    assert "#SBATCH --array=0-1\n" in first and "#SBATCH --job-name=my-study-0\n" in first
    assert '--stage 0 --index "$SLURM_ARRAY_TASK_ID"' in first

    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@" >> "$SEEN"; wc -l < "$SEEN"\n')
    stub.chmod(0o755)
    seen = tmp_path / "seen"
    place = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "SEEN": str(seen)}
    subprocess.run(["bash", paths[-1], "--partition=x"], env=place, check=True, capture_output=True)
    words = [line.split() for line in seen.read_text().splitlines()]
    assert [line[1:-1] for line in words] == [
        ["--partition=x"],
        ["--dependency=afterany:1", "--partition=x"],
        ["--dependency=afterany:2", "--partition=x"],
    ]
    with pytest.raises(UserError, match="a job is named after the folder"):
        write_jobs("slurm", "x.py", Path("…"), tmp_path, grid)


def test_a_jobset_is_indexed_and_its_stages_follow_one_another(tmp_path):
    yaml = pytest.importorskip("yaml")
    grid = stages(in_order([A, B, C, D], "here"))
    (path,) = write_jobs("jobset", "it's.py:x=1", tmp_path / "My Study", tmp_path / "jobs", grid)
    jobs = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    assert [job["template"]["spec"]["completions"] for job in jobs] == [2, 1, 1]
    assert "dependsOn" not in jobs[0] and jobs[2]["dependsOn"] == [{"name": "stage1", "status": "Complete"}]
    for stage, job in enumerate(jobs):
        spec = job["template"]["spec"]
        assert spec["completionMode"] == "Indexed" and spec["backoffLimitPerIndex"] == 3
        args = spec["template"]["spec"]["containers"][0]["args"]
        assert args[:3] == ["study", "--config", "it's.py:x=1"]
        assert args[-4:] == ["--stage", str(stage), "--index", "$(JOB_COMPLETION_INDEX)"]
