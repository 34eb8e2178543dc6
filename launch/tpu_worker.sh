#!/usr/bin/env bash
# What a host of a Cloud TPU slice does. tpu_vm.sh and tpu_queued.sh copy this file there and run it on every host.
#
#   tpu_worker.sh setup BUCKET    install the copied source; mount the Cloud Storage bucket BUCKET
#   tpu_worker.sh run ARGS...     train as one of the run's processes; ARGS are those of `scaling-perception train`
#   tpu_worker.sh stop            ask the training on this host to save and stop; waits for it
#   tpu_worker.sh number          print this host's place among the processes
#   tpu_worker.sh --dry-run ...   print the commands, run nothing
#
# Everything lies in HOME/scaling-perception: source.tgz (copied here), source/, venv/, bucket/ (the mounted bucket).
# Training runs in that folder, so that `--workdir bucket/runs/mine` is in the bucket, the same for every host and for
# the next slice. The place among the processes comes from the metadata server (METADATA in the environment: another).
set -euo pipefail

show=''
[[ ${1:-} != --dry-run ]] || { show=1 && shift; }
run() {
  if [[ $show ]]; then echo "${*@Q}"; else "$@"; fi
}
home=$HOME/scaling-perception

attribute() { curl -fsS -H 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/attributes/$1"; }
variable() { sed -n "s/^$1: *'\(.*\)' *$/\1/p" <<<"$tpu_env"; } # a line of tpu-env: NAME: 'value'

setup() {
  run mkdir -p "$home/source" "$home/bucket"
  run tar -xzf "$home/source.tgz" -C "$home/source"
  run python3 -m pip install --quiet --user uv # the images bring an older Python than ours
  [[ -x $home/venv/bin/python ]] || run python3 -m uv venv --python 3.12 "$home/venv"
  run python3 -m uv pip install --quiet --python "$home/venv/bin/python" -e "$home/source[tpu]"
  ! mountpoint -q "$home/bucket" || return 0
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
    local site=https://packages.cloud.google.com/apt
    run sudo curl -fsS "$site/doc/apt-key.gpg" -o "$key"
    run sudo bash -c "echo 'deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main' >$list"
    run sudo apt-get update -qq
    run sudo apt-get install -qq -y gcsfuse
  fi
  run gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" "$home/bucket" # a checkpoint is renamed when whole
}

place() { # sets the three variables by which the processes find each other
  metadata=http://${METADATA:-metadata.google.internal}
  tpu_env=$(attribute tpu-env)
  IFS=, read -r -a hosts <<<"$(attribute worker-network-endpoints)" # name:id:address, or names alone
  slices=$(variable MEGASCALE_NUM_SLICES) slice=$(variable MEGASCALE_SLICE_ID)
  first=$(variable MEGASCALE_COORDINATOR_ADDRESS)
  first=${first:-${hosts[0]##*:}}
  export SCALING_PERCEPTION_COORDINATOR=${first%%:*}:8482
  export SCALING_PERCEPTION_PROCESSES=$((${#hosts[@]} * ${slices:-1}))
  SCALING_PERCEPTION_PROCESS=$((${#hosts[@]} * ${slice:-0} + $(attribute agent-worker-number)))
  export SCALING_PERCEPTION_PROCESS
}

train() {
  if [[ ! $show ]]; then
    place
    stop # an earlier one whose connection was lost
    cd "$home" && echo $$ >pid
  fi
  run exec "$home/venv/bin/python" -u -m scaling_perception train "$@"
}

stop() {
  local pid
  pid=$(cat "$home/pid" 2>/dev/null) || return 0
  ! training "$pid" || run kill -s TERM "$pid"
  while [[ ! $show ]] && training "$pid"; do sleep 1; done
}
training() { grep -aqs scaling_perception "/proc/$1/cmdline"; } # and no other process that got the number since

case ${1:-} in
  setup) setup "${2:?BUCKET is missing}" ;;
  run) shift && train "$@" ;;
  stop) stop ;;
  number) [[ $show ]] || { place; echo "$SCALING_PERCEPTION_PROCESS"; } ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && [[ ${1:-} == --help || ${1:-} == -h ]] || exit 2 ;;
esac
