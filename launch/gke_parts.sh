#!/usr/bin/env bash
# Prepare, evaluate or predict in parts on a GKE cluster: fill in gke_parts.yaml and submit it with kubectl.
#
#   launch/gke_parts.sh NAME --parts N --accelerator A --topology T --image IMAGE --bucket BUCKET [options] -- VERB ARGS...
#
#   NAME             of the JobSet
#   --parts N        jobs that share the work, each on a TPU host of its own
#   --accelerator A  label of the nodes: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
#   --topology T     of one host, such as 2x4 or 2x2x1
#   --image IMAGE    container with this package and its extra `tpu` installed for python3
#   --bucket BUCKET  Cloud Storage bucket, mounted as `bucket`
#   VERB ARGS        of `scaling-perception`: prepare, evaluate or predict, with places such as `bucket/SOME/FOLDER`
#   --at-once N      parts that run at the same time (default: all)
#   --account A      Kubernetes service account that may read and write the bucket (default `default`)
#   --restarts N     times that a part starts again after a failure or a lost host (default 1000)
#   --dry-run        print the filled JobSet and the command, run nothing
#
# The cluster needs JobSet from 0.8 on and the Cloud Storage FUSE driver. Every part runs VERB with `--shard auto/N` and
# goes on where it stopped; when all are complete a last job runs it with `--merge`. A mistake (exit code 2) ends all.
# Follow it: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME   End it: kubectl delete jobset NAME
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.bash" # fail, value_of, need_bucket
declare -A set=([RUN]='' [PARTS]='' [ACCELERATOR]='' [TOPOLOGY]='' [IMAGE]='' [BUCKET]='' [AT_ONCE]='' [ACCOUNT]=default
  [RESTARTS]=1000)
dry_run=''
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --parts | --accelerator | --topology | --image | --bucket | --at-once | --account | --restarts)
      [[ ${2:-} ]] || fail "$1 has no value"
      field=${1#--} && field=${field//-/_} && set[${field^^}]=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) [[ -z ${set[RUN]} && $1 != -* ]] || fail "'$1' is unknown; write -- before VERB"
       set[RUN]=$1 && shift ;;
  esac
done
for field in RUN PARTS ACCELERATOR TOPOLOGY IMAGE BUCKET; do [[ ${set[$field]} ]] || fail "${field,,} is missing"; done
[[ ${1:-} && $1 != -* ]] || fail "VERB is missing"
[[ ${set[RUN]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "NAME '${set[RUN]}': small letters, digits and -, up to 40"
[[ ${set[TOPOLOGY]} =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "--topology ${set[TOPOLOGY]}: write it as 2x4 or 2x2x1"
set[AT_ONCE]=${set[AT_ONCE]:-${set[PARTS]}}
for field in PARTS AT_ONCE RESTARTS; do
  name=${field,,} && [[ ${set[$field]} =~ ^[1-9][0-9]*$ ]] || fail "--${name//_/-} ${set[$field]} is no number above 0"
done
set[CHIPS]=$((${set[TOPOLOGY]//x/*}))
((set[CHIPS] <= 8)) || fail "--topology ${set[TOPOLOGY]} has ${set[CHIPS]} chips, and one host at most 8: a part is one process"
case $1 in
  prepare | predict) written=--out ;;
  evaluate) written=--json ;;
  *) fail "VERB '$1' has no parts: give prepare, evaluate or predict" ;;
esac
[[ $(value_of "$written" "$@") == *://* ]] || need_bucket "$written" "$@" # prepare also writes to an address
list() { # words as a list of JSON strings
  local quoted=() word
  for word in "$@"; do word=${word//\\/\\\\} && quoted+=("\"${word//\"/\\\"}\""); done
  (IFS=, && echo "[${quoted[*]}]")
}
set[SHARD]=$(list "$1" --shard "auto/${set[PARTS]}" "${@:2}")
set[MERGE]=$(list "$1" --merge "${@:2}")

filled=$(<"$here/gke_parts.yaml")
for field in "${!set[@]}"; do filled=${filled//"\${$field}"/"${set[$field]}"}; done
if [[ $dry_run ]]; then
  echo "# kubectl apply -f - <<END" && echo "$filled" && exit
fi
kubectl apply -f - <<<"$filled"
