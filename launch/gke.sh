#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster: fill in gke_jobset.yaml and submit it with kubectl.
#
#   launch/gke.sh NAME --accelerator A --topology T --image IMAGE --bucket BUCKET [options] -- ARGS...
#
#   NAME             of the JobSet
#   --accelerator A  label of the nodes: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
#   --topology T     of a slice, such as 4x4 or 4x4x4
#   --image IMAGE    container with this package and its extra `tpu` installed for python3
#   --bucket BUCKET  Cloud Storage bucket, mounted as `bucket`, best with a hierarchical namespace
#   ARGS             of `scaling-perception train`, with `--workdir bucket/SOME/FOLDER`
#   --slices N       slices that train together, over the data centre's network (default 1)
#   --chips N        chips of one host (default 4; 1 or 8 on such machine types)
#   --account A      Kubernetes service account that may read and write the bucket (default `default`)
#   --restarts N     times that all hosts start again after a failure or a lost host (default 1000)
#   --dry-run        print the filled JobSet and the command, run nothing
#
# The cluster needs JobSet and the Cloud Storage FUSE driver; nodes on spot capacity are tolerated. After a failure all
# hosts start again and resume in the run's folder; a mistake of the user (exit code 2) ends the JobSet.
# Follow it: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME   End it: kubectl delete jobset NAME
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.bash" # fail, need_bucket
declare -A set=([RUN]='' [ACCELERATOR]='' [TOPOLOGY]='' [IMAGE]='' [BUCKET]='' [SLICES]=1 [CHIPS]=4 [ACCOUNT]=default
  [RESTARTS]=1000)
dry_run=''
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --accelerator | --topology | --image | --bucket | --slices | --chips | --account | --restarts)
      [[ ${2:-} ]] || fail "$1 has no value"
      field=${1#--} && set[${field^^}]=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) [[ -z ${set[RUN]} && $1 != -* ]] || fail "'$1' is unknown; write -- before the arguments of train"
       set[RUN]=$1 && shift ;;
  esac
done
for field in RUN ACCELERATOR TOPOLOGY IMAGE BUCKET; do [[ ${set[$field]} ]] || fail "${field,,} is missing"; done
(($#)) || fail "ARGS are missing"
[[ ${set[RUN]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "NAME '${set[RUN]}': small letters, digits and -, up to 40"
[[ ${set[TOPOLOGY]} =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "--topology ${set[TOPOLOGY]}: write it as 4x4 or 4x4x4"
for field in SLICES CHIPS RESTARTS; do [[ ${set[$field]} =~ ^[0-9]+$ ]] || fail "--${field,,} ${set[$field]} is no number"; done
need_bucket --workdir "$@"
chips=$((${set[TOPOLOGY]//x/*}))
((set[CHIPS] <= chips)) || set[CHIPS]=$chips
set[HOSTS]=$((chips / set[CHIPS]))
quoted=() # words as JSON strings
for word in "$@"; do word=${word//\\/\\\\} && quoted+=("\"${word//\"/\\\"}\""); done
set[ARGS]="[$(IFS=, && echo "${quoted[*]}")]"

filled=$(<"$here/gke_jobset.yaml")
for field in "${!set[@]}"; do filled=${filled//"\${$field}"/"${set[$field]}"}; done
if [[ $dry_run ]]; then
  echo "# kubectl apply -f - <<END" && echo "$filled" && exit
fi
kubectl apply -f - <<<"$filled"
