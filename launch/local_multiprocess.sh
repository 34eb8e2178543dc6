#!/usr/bin/env bash
# Run N processes of one training run on this machine, as a pod or a cluster would.
#
#   launch/local_multiprocess.sh [--devices D] [--grace S] [--dry-run] N -- ARGS...
#
#   N            processes; ARGS are those of `scaling-perception train`
#   --devices D  give each process D fake CPU devices (and no other)
#   --grace S    seconds from the first failure until what still runs is killed (default 30)
#   --dry-run    print the commands, run nothing
#
# The processes find each other by SCALING_PERCEPTION_COORDINATOR (host:port), SCALING_PERCEPTION_PROCESSES (N) and
# SCALING_PERCEPTION_PROCESS (0 .. N - 1). Each line of their output begins with [process]. When one fails, the others
# are stopped; the exit code is that of the first failure. SIGINT and SIGTERM go on to all, and are waited for: a
# training run saves and exits with 130 or 143. Environment: PYTHON, the interpreter (default python3).
set -euo pipefail
set -m # each process in a group of its own: Ctrl-C reaches it once, from here

fail() { echo "local_multiprocess.sh: $1 (see --help)" >&2 && exit 2; }
number() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2': give a whole number above 0"; }

devices='' grace=30 dry_run='' count=''
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --devices) devices=${2:-} && number --devices "$devices" && shift 2 ;;
    --grace) grace=${2:-} && number --grace "$grace" && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    -*) fail "unknown option $1" ;;
    *) [[ -z $count ]] || fail "'$1' comes after N: write -- before the arguments of train"
       count=$1 && number N "$count" && shift ;;
  esac
done
[[ $count ]] || fail "N is missing"

port=$((20000 + RANDOM % 10000)) # below the ports that systems hand out by themselves
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 10000)); done
settings=("SCALING_PERCEPTION_COORDINATOR=127.0.0.1:$port" "SCALING_PERCEPTION_PROCESSES=$count")
[[ -z $devices ]] ||
  settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
command=("${PYTHON:-python3}" -u -m scaling_perception train "$@")
if [[ $dry_run ]]; then
  for ((i = 0; i < count; i++)); do echo "env ${settings[*]@Q} SCALING_PERCEPTION_PROCESS=$i ${command[*]@Q}"; done
  exit 0
fi

pids=() readers=() code=0 asked='' timer=''
pipes=$(mktemp -d) && mkfifo "$pipes/idle"
signal_all() { for pid in "${pids[@]}"; do kill -s "$1" -- "-$pid" || true; done; }
trap 'signal_all KILL; rm -rf "$pipes"' EXIT
trap 'asked=1; signal_all INT' INT
trap 'asked=1; signal_all TERM' TERM
for ((i = 0; i < count; i++)); do
  mkfifo "$pipes/$i" && exec 4<>"$pipes/$i" # both ends are opened here, so that nobody waits for the other
  exec 5<"$pipes/$i" && exec 6>"$pipes/$i" 4>&-
  sed -u "s/^/[$i] /" <&5 6>&- & readers+=($!)
  env "${settings[@]}" "SCALING_PERCEPTION_PROCESS=$i" "${command[@]}" </dev/null >&6 2>&1 5<&- 6>&- & pids+=($!)
  exec 5<&- 6>&-
done
exec 2>/dev/null 3<>"$pipes/idle" # without what the shell says of jobs that end

while ((${#pids[@]})); do
  read -r -t 0.1 <&3 || true # sleeps; unlike `wait -n`, which loses a job now and then, it lets traps run
  left=()
  for pid in "${pids[@]}"; do
    kill -0 "$pid" && left+=("$pid") && continue
    last=0
    wait "$pid" || last=$?
    kill -s KILL -- "-$pid" || true # what it may have left behind, such as readers of data
    ((last && !code)) || continue
    code=$last
    [[ $asked ]] || signal_all TERM # who was asked to stop is saving already
    (sleep "$grace" && signal_all KILL) >/dev/null & timer=$!
  done
  pids=("${left[@]}")
done
[[ -z $timer ]] || kill -s KILL -- "-$timer" || true
wait "${readers[@]}" || true
exit "$code"
