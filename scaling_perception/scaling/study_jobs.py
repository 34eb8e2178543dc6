"""A study as jobs of a scheduler that is there already: a SLURM array, or an indexed JobSet of Kubernetes.

A stage is the cells that can run side by side; the next begins when it has ended. Each job runs one cell by
``study --stage K --index I``, which leaves a finished cell alone and refuses one whose needs are not done. A cell takes
one node, with all its chips in one process.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from scaling_perception.scaling.study import Cell
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_text

_ARRAY = """#!/usr/bin/env bash
#SBATCH --job-name={name}-{stage}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Stage {stage}: {cells}
# Options of sbatch win over the lines above. Environment: PYTHON, the interpreter on the nodes (default python3).
# At SIGTERM the cell saves, and this script requeues its task of the array.
set -euo pipefail
cd {folder}
asked=''
trap 'asked=1; kill -TERM $!' TERM
"${{PYTHON:-python3}}" -u -m scaling_perception {words} \\
  --stage {stage} --index "$SLURM_ARRAY_TASK_ID" &
while kill -0 $! 2>/dev/null; do wait $! || true; done # a trap ends a wait; saving goes on
code=0
wait $! || code=$?
if [[ $asked && $code != 0 ]]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
  exit 0
fi
exit "$code"
"""

_SUBMIT = """#!/usr/bin/env bash
# Submit the stages of the study, each when the one before has ended: bash {path} [options of sbatch]
# afterany: a cell that failed stops only the cells that need it, which say so. Run it again to do what is left.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
after=()
for stage in {stages}; do
  job=$(sbatch --parsable ${{after[@]+"${{after[@]}}"}} "$@" "$here/stage$stage.sbatch")
  echo "stage $stage: job ${{job%%;*}}"
  after=("--dependency=afterany:${{job%%;*}}")
done
echo {last}
"""

_JOBSET = """# A study on TPU slices of one host each: kubectl apply -f {path}
# IMAGE, BUCKET, ACCELERATOR, TOPOLOGY, CHIPS and ACCOUNT are those of launch/gke.sh: fill them in by envsubst. The
# study's folder (--out) and all data must lie below bucket/; all cells of a stage start as far as there are slices.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  replicatedJobs:
{jobs}"""

_JOB = """    - name: stage{stage} # {cells}
      replicas: 1
{depends}      template:
        spec:
          completionMode: Indexed
          completions: {count}
          parallelism: {count}
          backoffLimitPerIndex: 3 # a lost host: the cell resumes; the others go on
          maxFailedIndexes: {count}
          podFailurePolicy:
            rules:
              - action: FailIndex # a mistake of the user is the same after a restart
                onExitCodes:
                  containerName: cell
                  operator: In
                  values: [2]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              serviceAccountName: ${{ACCOUNT}}
              terminationGracePeriodSeconds: 300 # SIGTERM saves
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: ${{ACCELERATOR}}
                cloud.google.com/gke-tpu-topology: ${{TOPOLOGY}}
              containers:
                - name: cell
                  image: ${{IMAGE}}
                  workingDir: /run-files
                  command: [python3, -u, -m, scaling_perception]
                  args: [{args}, --stage, "{stage}", --index, $(JOB_COMPLETION_INDEX)]
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu,cpu
                  resources:
                    requests:
                      google.com/tpu: ${{CHIPS}}
                    limits:
                      google.com/tpu: ${{CHIPS}}
                  volumeMounts:
                    - name: bucket
                      mountPath: /run-files/bucket
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: ${{BUCKET}}
                      mountOptions: implicit-dirs,rename-dir-limit=100000
"""


def write_jobs(kind: str, config: str, out: Path, folder: Path, grid: Sequence[Sequence[Cell]]) -> list[Path]:
    """Write the files of the jobs into ``folder``; the one to submit comes last.

    Args:
        kind: ``slurm`` or ``jobset``.
        config: spec of the study. out: its folder. grid: its cells by stage.

    Raises:
        UserError: the folder cannot be written, or the study's folder has no name that a job can carry.
    """
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in out.name.lower()).strip("-")
    if not name:
        raise UserError(f"--out {out}: a job is named after the folder: choose one with letters or digits in its name")
    words = ["study", "--config", config, "--out", str(out)]
    if kind == "jobset":
        path = folder / "jobset.yaml"
        write_text(path, _jobset(name, words, path, grid))
        return [path]
    paths = []
    for stage, cells in enumerate(grid):
        known = {"name": name, "stage": stage, "last": len(cells) - 1, "cells": _names(cells)}
        paths.append(folder / f"stage{stage}.sbatch")
        write_text(paths[-1], _ARRAY.format(**known, folder=shlex.quote(str(Path.cwd())), words=shlex.join(words)))
    paths.append(folder / "submit.sh")
    numbers = " ".join(str(stage) for stage in range(len(grid)))
    last = shlex.quote(f"when they have ended: scaling-perception {shlex.join(words)} --collect")
    write_text(paths[-1], _SUBMIT.format(path=paths[-1], stages=numbers, last=last))
    return paths


def _jobset(name: str, words: Sequence[str], path: Path, grid: Sequence[Sequence[Cell]]) -> str:
    args = ", ".join(f"'{word.replace(chr(39), chr(39) * 2)}'" for word in words)
    jobs = ""
    for stage, cells in enumerate(grid):
        depends = f"      dependsOn:\n        - name: stage{stage - 1}\n          status: Complete\n" if stage else ""
        known = {"stage": stage, "cells": _names(cells), "depends": depends, "count": len(cells), "args": args}
        jobs += _JOB.format(**known)
    return _JOBSET.format(path=path, name=name[:40].strip("-"), jobs=jobs)


def _names(cells: Sequence[Cell]) -> str:
    shown = ", ".join(cell.name for cell in cells[:4])
    return shown + (f" and {len(cells) - 4} more" if len(cells) > 4 else "")
