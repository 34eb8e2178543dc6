#!/usr/bin/env bash
# Train on Cloud TPU slices that are queued for: each host starts training by itself whenever its slice comes up.
#
#   launch/tpu_queued.sh NAME --type TYPE --zone ZONE --bucket BUCKET [options] -- ARGS...
#
#   NAME, --type, --zone, --bucket, ARGS, --version, --spot: as in tpu_vm.sh
#   --slices N       slices that train together, over the data centre's network (default 1)
#   --dry-run        print the commands of one round, run nothing
#
# The source and a start-up script go to BUCKET/launch/NAME/; the script runs on every host at each boot: install, mount,
# train. This script watches: resources that are suspended (taken away) or failed are deleted and queued for again, and
# training resumes in its folder. When training ends, host 0 leaves its exit code in BUCKET/launch/NAME/exit; then the
# resources are deleted, and this script exits with that code. It may be stopped at any time and started again.
# Environment: CLOUDSDK_CORE_PROJECT, the project; PAUSE, seconds between looks (default 60).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$here/launch/arguments.bash" # fail, value, need_bucket, need_config
source=(scaling_perception configs launch pyproject.toml README.md LICENSE) # what hosts need: no data, models or results
name='' type='' zone='' bucket='' version='' slices=1 spot=() dry_run=''
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --type | --zone | --bucket | --version | --slices) value "$1" "${2:-}" && shift 2 ;;
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
((slices > 1)) && nodes=(--node-count "$slices" --node-prefix "$name") || nodes=(--node-id "$name")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
place=gs://$bucket/launch/$name
run() { if [[ $dry_run ]]; then echo "${*@Q}"; else "$@"; fi; }
queued() { run gcloud compute tpus queued-resources "$1" "$name" "${@:2}" --zone "$zone"; }
cat >"$work/start.sh" <<END
#!/usr/bin/env bash
export HOME=/root
mkdir -p \$HOME/scaling-perception && cd \$HOME/scaling-perception
gcloud storage cp $place/source.tgz $place/tpu_worker.sh .
for try in 1 2 3; do
  code=1
  bash tpu_worker.sh setup ${bucket@Q} && code=0 && { bash tpu_worker.sh run ${*@Q} || code=\$?; }
  case \$code in 130 | 143) exit ;; 0 | 2) break ;; esac # the machine goes down; done; the user's mistake
done
[[ \$(bash tpu_worker.sh number) != 0 ]] || echo \$code | gcloud storage cp - $place/exit
END
state() {
  queued describe --format='value(state.state)' 2>"$work/error" || { grep -q NOT_FOUND "$work/error" && echo ABSENT; } || true
}
submit() {
  run tar -czf "$work/source.tgz" -C "$here" --exclude=__pycache__ "${source[@]}"
  run gcloud storage cp "$work/source.tgz" "$here/launch/tpu_worker.sh" "$work/start.sh" "$place/"
  queued create "${nodes[@]}" --accelerator-type "$type" --runtime-version "${version:-$default}" "${spot[@]}" \
    --metadata-from-file "startup-script=$work/start.sh"
}
if [[ $dry_run ]]; then
  submit && queued describe --format='value(state.state)' && queued delete --force --quiet
  echo "# the start-up script:" && cat "$work/start.sh" && exit
fi
while true; do
  if code=$(gcloud storage cat "$place/exit" 2>/dev/null); then
    queued delete --force --quiet
    gcloud storage rm "$place/exit"
    exit "$code"
  fi
  case $(state) in
    ABSENT) submit ;;
    SUSPENDED | FAILED) queued delete --force --quiet && continue ;;
    '') cat "$work/error" >&2 ;;
  esac
  sleep "${PAUSE:-60}"
done
