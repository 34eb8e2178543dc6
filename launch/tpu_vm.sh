#!/usr/bin/env bash
# Train on a Cloud TPU slice: create it, copy this checkout, install, run on all hosts; again when it is taken away.
#
#   launch/tpu_vm.sh NAME --type TYPE --zone ZONE --bucket BUCKET [options] -- ARGS...
#
#   NAME             of the slice; one of that name that exists is used
#   --type TYPE      such as v5litepod-16, v5p-128 or v6e-64
#   --bucket BUCKET  Cloud Storage bucket, mounted on all hosts as `bucket`, best with a hierarchical namespace
#   ARGS             of `scaling-perception train`, with `--workdir bucket/SOME/FOLDER` and a config of configs/ or bucket/
#   --version V      runtime version (default: that of TYPE)
#   --spot           a slice that may be taken away at any time, at a lower price
#   --dry-run        print the commands of one round, run nothing
#
# A slice that is neither ready nor on its way is deleted and created again, and training resumes in its folder. At the
# end it is deleted. Ctrl-C or SIGTERM asks the training on all hosts to save and stop, and leaves the slice.
# Environment: CLOUDSDK_CORE_PROJECT, the project; PAUSE, seconds between looks at a slice that is not ready (default
# 30); TRIES, failures in a row on a sound slice after which to give up (default 3).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/arguments.bash" # fail, value, need_bucket, need_config
source=(scaling_perception configs launch pyproject.toml README.md LICENSE) # what hosts need: no data, models or results
name='' type='' zone='' bucket='' version='' spot=() dry_run='' pause=${PAUSE:-30} tries=${TRIES:-3}
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --type | --zone | --bucket | --version) value "$1" "${2:-}" && shift 2 ;;
    --spot) spot=(--spot) && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) [[ -z $name && $1 != -* ]] || fail "'$1' is unknown; write -- before the arguments of train"
       name=$1 && shift ;;
  esac
done
[[ $name && $type && $zone && $bucket && $# -gt 0 ]] || fail "NAME, --type, --zone, --bucket and ARGS are needed"
need_bucket --workdir "$@" && need_config "$here" "$@"
case $type in v5p*) default=v2-alpha-tpuv5 ;; v6e*) default=v2-alpha-tpuv6e ;; *) default=v2-alpha-tpuv5-lite ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'hosts stop; exit 143' TERM
trap 'hosts stop; exit 130' INT
run() { if [[ $dry_run ]]; then echo "${*@Q}"; else "$@"; fi; }
tpu() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$zone"; }
hosts() { tpu ssh "$name" --worker=all --command "bash scaling-perception/tpu_worker.sh ${*@Q}"; }
state() {
  [[ ! $dry_run ]] || { echo ABSENT && return; }
  tpu describe "$name" --format='value(state)' 2>"$work/error" || { grep -q NOT_FOUND "$work/error" && echo ABSENT; } || true
}
create() { # waits while there is no room for it; another error is for a person
  until tpu create "$name" --accelerator-type "$type" --version "${version:-$default}" "${spot[@]}" 2>"$work/error"; do
    cat "$work/error" >&2 && grep -qiE 'capacity|exhausted|stockout' "$work/error" || exit 1
    sleep "$pause"
  done
}
install() {
  run tar -czf "$work/source.tgz" -C "$here" --exclude=__pycache__ "${source[@]}" &&
    tpu ssh "$name" --worker=all --command 'mkdir -p scaling-perception' &&
    tpu scp "$work/source.tgz" "$here/launch/tpu_worker.sh" "$name:scaling-perception/" --worker=all &&
    hosts setup "$bucket"
}

failures=0 installed=''
while ((failures < tries)); do
  case $(state) in
    READY) ;;
    ABSENT) create && installed='' ;;
    CREATING | STARTING | RESTARTING | REPAIRING) sleep "$pause" && continue ;;
    '') cat "$work/error" >&2 && failures=$((failures + 1)) && sleep "$pause" && continue ;;
    *) tpu delete "$name" --quiet || sleep "$pause" && continue ;;
  esac
  if [[ $installed ]] || install; then
    installed=1
    hosts run "$@" & # so that a signal is heard at once
    ! wait $! || { tpu delete "$name" --quiet && exit; }
  fi
  if [[ $(state) == READY ]]; then failures=$((failures + 1)); else failures=0; fi
done
echo "tpu_vm.sh: $tries failures in a row on a sound slice, which is kept: mend the cause, run this again" >&2 && exit 1
