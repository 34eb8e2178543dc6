#!/usr/bin/env bash
# Rehearse failures: run COMMAND, kill a process of it at random moments, start it again, until it ends by itself.
#
#   launch/with_failures.sh [--kills K] [--within S] [--seed N] [--dry-run] -- COMMAND...
#
#   COMMAND     a training run that resumes: `scaling-perception train ARGS...`, or several processes,
#               `launch/local_multiprocess.sh 2 -- ARGS...`
#   --kills K   how many (default 5); then the run is left in peace
#   --within S  each comes at a random moment of the first S seconds after a start (default 60)
#   --seed N    draw the same moments again (default: a random one, which is told)
#   --dry-run   print the moments and the command, run nothing
#
# A kill is SIGKILL to one of the processes that train, drawn at random: nothing is saved and nobody is told. COMMAND has
# to end then, and to go on where it was when it is run again. Afterwards `scaling-perception report WORKDIR` tells what
# the failures cost. Any other end ends the rehearsal with its exit code: 0 if the run finished. SIGINT and SIGTERM reach
# COMMAND as SIGTERM, and are waited for.
set -euo pipefail

exec 3>&2 # later the shell's own errors, such as what it says of jobs that were killed, go nowhere
say() { echo "with_failures.sh: $1" >&3; }
fail() { say "$1 (see --help)" && exit 2; }
number() { [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1 is '$2': give a whole number from 1 to 999999"; }

kills=5 within=60 seed=$((RANDOM + 1)) dry_run=''
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --kills) kills=${2:-} && number --kills "$kills" && shift 2 ;;
    --within) within=${2:-} && number --within "$within" && shift 2 ;;
    --seed) seed=${2:-} && number --seed "$seed" && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) fail "'$1' is unknown: options, then -- and the command" ;;
  esac
done
(($#)) || fail "COMMAND is missing"

RANDOM=$seed
moments=() draws=()
for ((i = 0; i < kills; i++)); do
  moments+=("$(((RANDOM << 15 | RANDOM) % (within * 10)))") # tenths of a second
  draws+=("$RANDOM")
done
if [[ $dry_run ]]; then
  for moment in "${moments[@]}"; do echo "# kill after $((moment / 10)).$((moment % 10)) s"; done
  echo "${*@Q}"
  exit 0
fi
say "seed $seed"

run='' asked=''
exec 2>/dev/null
training() { pgrep -s "$run" -f -- '(-m scaling_perception|bin/scaling-perception) train ' || true; }
trap 'asked=1; kill -s TERM "$run" || true' INT TERM # what runs in the background is deaf to SIGINT
trap '[[ -z $run ]] || pkill -KILL -s "$run" || true' EXIT
for ((i = 0; ; i++)); do
  setsid "$@" 2>&3 3>&- & run=$! # a session of its own: whatever it starts can be found by it
  for ((tenths = 0; i < kills && tenths < moments[i]; tenths++)); do
    kill -0 "$run" || break
    sleep 0.1 || true
  done
  victim=''
  if ((i < kills)) && [[ -z $asked ]] && kill -0 "$run"; then
    mapfile -t found < <(training)
    victim=${found[draws[i] % (${#found[@]} + !${#found[@]})]:-$run} # before any trains: the command itself
    kill -s KILL "$victim" || victim=''
  fi
  while kill -0 "$run"; do wait "$run" || true; done # a trap ends a wait
  code=0
  wait "$run" || code=$?
  pkill -KILL -s "$run" || true # what it may have left behind
  [[ $victim && ! $asked && $code != 0 ]] || break
  say "kill $((i + 1)) of $kills after $((tenths / 10)).$((tenths % 10)) s, process $victim; exit code $code; again"
done
((i >= kills)) || say "ended before kill $((i + 1)) of $kills"
exit "$code"
