"""Who joins: environments as launchers make them, and what JAX finds in them."""

import os
import subprocess
import sys

import pytest
from jax._src.clusters import cloud_tpu_cluster

from scaling_perception import cli
from scaling_perception.parallel.joining import COORDINATOR, PROCESS, PROCESSES, join, other_processes
from scaling_perception.support.errors import UserError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
STEP |= {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLICES = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}
SLICES |= {"MEGASCALE_COORDINATOR_ADDRESS": "host", "MEGASCALE_SLICE_ID": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OUTRIGHT = {COORDINATOR: "localhost:1", PROCESSES: "3", PROCESS: "2"}


@pytest.fixture
def joined(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *where, initialization_timeout: calls.append(where))
    return calls


@pytest.mark.parametrize(
    ("environment", "tpu", "called"),
    [
        ({}, False, None),
        (STEP, False, (None, 2)),
        ({**STEP, "SLURM_NTASKS": "8"}, False, (None, 2)),  # a step of two in a job of eight
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False, None),  # salloc's interactive step
        (SHELL, False, None),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, False, (None, 4)),
        (SLICES, True, (None, 2)),  # of one host each
        ({**SLICES, "TPU_WORKER_HOSTNAMES": "a,b"}, True, (None, 4)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "host", "MEGASCALE_NUM_SLICES": "1", "JOB_COMPLETION_INDEX": "0"}, True, None),
        ({"MEGASCALE_NUM_SLICES": "1"}, True, (None, 3)),  # the metadata server alone knows
        (POD, False, None),
        (OUTRIGHT, False, ("localhost:1", 3, 2)),
        ({**OUTRIGHT, PROCESSES: "1", PROCESS: "0"}, False, None),
        ({**STEP, PROCESSES: "1"}, False, None),
    ],
)
def test_joins_where_jax_finds_several(monkeypatch, joined, environment, tpu, called):
    endpoints = "a:b:10.0.0.1,a:b:10.0.0.2,c:d:10.0.0.3"  # of a TPU VM; GKE has no such attributes
    known = {} if "TPU_WORKER_HOSTNAMES" in environment else {"worker-network-endpoints": endpoints}

    def metadata(key):
        return known.get(key, ""), 200 if known else 404

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", metadata)
    before = dict(os.environ)
    join(environment)
    assert joined == ([called] if called else []) and dict(os.environ) == before
    monkeypatch.setattr("scaling_perception.parallel.joining._may_be_tpu", lambda: tpu)
    assert bool(other_processes(environment)) == (called is not None)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4"),  # Open MPI 5, which JAX does not know
        (SLICES, "MEGASCALE_NUM_SLICES=2"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
        ({**POD, "JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS=host:1"),
    ],
)
def test_what_looks_like_several_and_is_no_cluster_is_refused(monkeypatch, joined, capsys, environment, named):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    with pytest.raises(UserError) as caught:
        join(environment)
    assert named in str(caught.value) and f"{PROCESSES}=1" in str(caught.value) and not joined
    join({**environment, PROCESSES: "1"})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["evaluate", "--task", "depth", "--dataset", "scenes", "--model", "mini", "--json", "x"]) == 2
    assert named in capsys.readouterr().err


def test_what_jax_cannot_find_out_is_told(monkeypatch, joined):
    def offline(key):
        raise OSError("no route to metadata.google.internal")

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", offline)
    with pytest.raises(UserError, match=f"GceTpuCluster: no route.*set {PROCESSES}=1"):
        join({})
    join({PROCESSES: "1"})
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)  # JAX has hidden its detection
    join(STEP)
    assert joined == [(None, 2)]


@pytest.mark.parametrize("error", [RuntimeError("port in use"), ValueError("coordinator_address should be defined.")])
def test_joining_that_fails_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(UserError, match=str(error)) as caught:
        join(STEP)
    assert caught.value.code == (1 if isinstance(error, RuntimeError) else 2)  # 1: a launcher starts it again


@pytest.mark.parametrize("index", ["0", "1"])
@pytest.mark.slow
def test_who_waits_in_vain_says_so(index):
    own = {**os.environ, **OUTRIGHT, PROCESS: index, COORDINATOR: "127.0.0.1:27513"}
    own |= {"SCALING_PERCEPTION_JOIN_SECONDS": "2"}
    words = [sys.executable, "-m", "scaling_perception", "train", "--config", "configs/mini.py", "--workdir", "none"]
    done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "did not all join within 2 s" in done.stderr
