#!/usr/bin/env bash
# Everything that needs one GPU, within a budget, without a network: tests, speed, then a study of as many cells as there is time for.
#
#   benchmarks/on_gpu.sh OUT [PART …]     parts, in this order: tests compiles speed study; or model; or ablations
#
#   BUDGET   seconds for all of it (540); what does not fit is left out, and reported as such
#   WHEELS   folder of wheels to put on the path first: what the machine lacks (nothing is downloaded)
#   WORK     folder for compiled programs and the study (a new one); named again, what was begun goes on
#   START    folder in which the study has been begun, or nothing
#   STUDY    config of the study (configs/scenes_study.py); JOBS cells at a time (one for each core but two);
#            ONLY some of them, by patterns
#   BESIDE   parts that run while `model` renders, when the GPU has nothing to do, on one core less: `compiles speed`, say
#   SPEEDS   benches of `compiles` and `speed`, by a pattern (*): 'sample-*', say
#   FIRST    millions: number of the first world (0), for other worlds than an earlier run's; VAE of the latents
#            (tiny+lite0+match)
#   SIZE     of the part `model`: mini or small or both, side by side, trained on as many worlds as are rendered in RENDER
#            seconds (three fifths), for as many steps as fit into the rest or, as `mini:9000 small:5000`, for those;
#            RES pixels (128), BATCH (256), LR;
#            named again with the same WORK, what was begun goes on, and another size uses the same worlds
#   STEPS    of each of the trainings of `ablations` (4500), on the worlds of `model` (the same WORK), ABREAST (5) at a
#            time; OUT/ablations/ gets their models and evaluations; ONLY some, by a pattern
#   DEVICE   platforms of JAX (cuda,cpu); cpu rehearses it with the smallest model: BUDGET=120 DEVICE=cpu benchmarks/on_gpu.sh out
#
# OUT gets logs and JSON; study.tar.gz: its table, results and logs, without checkpoints and models; SIZE/: the model.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:?usage: benchmarks/on_gpu.sh OUT [tests] [compiles] [speed] [study] [model]}
shift
parts=${*:-tests compiles speed study}
mkdir -p "$out"
out=$(cd "$out" && pwd)
budget=${BUDGET:-540} device=${DEVICE:-cuda,cpu} vae=${VAE:-tiny+lite0+match} jobs=${JOBS:-$(($(nproc) > 3 ? $(nproc) - 2 : 1))}
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
begin=$SECONDS

left() { echo $((budget - (SECONDS - begin))); }
note() { echo "== $((SECONDS - begin)) s: $*"; }
within() { # within SECONDS COMMAND …: at most so long, and never beyond the budget
  local most=$1 rest
  shift
  rest=$(left)
  if [ "$rest" -lt 10 ]; then
    note "left out, no time: $*"
    return 124
  fi
  timeout -k 10 $((most < rest ? most : rest)) "$@"
}

if [ -n "${WHEELS:-}" ]; then
  for wheel in "$WHEELS"/*.whl; do python3 -m zipfile -e "$wheel" "$work/packages"; done
  export PYTHONPATH=$work/packages
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=$device
export JAX_COMPILATION_CACHE_DIR=$work/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
verb=(python3 -m scaling_perception)
python3 -c "import jax; print(jax.__version__, jax.devices())" || exit 2

tests() {
  note "tests that need an accelerator"
  # shellcheck disable=SC2046 # the files are several
  within 240 python3 -m pytest -p no:cacheprovider -o addopts= -q -m device $(grep -rl mark.device tests) 2>&1 | tee "$out/tests.log" | tail -n 15
}

speeds() { # name, arguments of `bench`
  every_speed | while read -r name words; do
    # shellcheck disable=SC2053 # a pattern
    if [[ $name == ${SPEEDS:-*} ]]; then echo "$name $words"; fi
  done
}

every_speed() {
  if [ "$device" = cpu ]; then
    echo "train-nano train --model nano --resolution 64 --batch 2"
    echo "sample-nano sample --model nano --resolution 64 --steps 2 --ensemble 2 --no-memory"
    return
  fi
  echo "train-xl2-256 train --model XL/2 --resolution 256 --batch 64 --dtype bfloat16 --remat"
  echo "train-xl2-512 train --model XL/2 --resolution 512 --batch 16 --dtype bfloat16 --remat"
  echo "train-a4-256 train --model a4 --resolution 256 --batch 128 --dtype bfloat16"
  echo "train-l2moe-256 train --model L/2-8E2A --resolution 256 --batch 32 --dtype bfloat16 --remat"
  echo "sample-xl2-512 sample --model XL/2 --resolution 512 --steps 200 --ensemble 5 --dtype bfloat16 --no-memory"
  echo "sample-a1-256 sample --model a1 --resolution 256 --steps 50 --ensemble 5 --dtype bfloat16 --no-memory"
}

compiles() {
  note "compiling what is measured, side by side"
  while read -r name words; do
    # shellcheck disable=SC2086 # the words are several
    XLA_PYTHON_CLIENT_PREALLOCATE=false within 200 "${verb[@]}" bench $words --quick >"$out/$name.compile.log" 2>&1 &
  done < <(speeds)
  wait
  tail -n 1 "$out"/*.compile.log
}

speed() {
  while read -r name words; do
    note "bench $words"
    # shellcheck disable=SC2086
    within 100 "${verb[@]}" bench $words --repeats 3 --json "$out/$name.json" --overwrite 2>&1 | tee "$out/$name.log" | tail -n 6
  done < <(speeds)
  note "attention"
  local sizes=16,32,48,64,72,96,112,128 tokens=1024
  [ "$device" = cpu ] && sizes=16 tokens=64
  within 90 python3 benchmarks/attention.py --sizes $sizes --tokens $tokens --json "$out/attention.json" 2>&1 | tee "$out/attention.log"
}

study() {
  local config=${STUDY:-configs/scenes_study.py} place=$work/study
  [ -z "${START:-}" ] || [ -d "$place" ] || cp -r "$START" "$place"
  note "study $config, $jobs cells at a time"
  # float32 products as on a CPU, not TensorFloat-32; SIGTERM lets every cell save what it has
  JAX_DEFAULT_MATMUL_PRECISION=float32 OMP_NUM_THREADS=1 timeout -s TERM -k 20 $(($(left) > 30 ? $(left) - 20 : 10)) \
    "${verb[@]}" study --config "$config" --out "$place" --jobs "$jobs" ${ONLY:+--only "$ONLY"} >"$out/study.out" 2>"$out/study.log"
  tail -n 5 "$out/study.log" "$out/study.out"
  "${verb[@]}" study --config "$config" --out "$place" --collect --csv "$out/study.csv" --overwrite 2>&1 | tail -n 2
  tar -C "$place" --exclude checkpoints --exclude tb --exclude model --exclude ./data -czf "$out/study.tar.gz" .
  ls -l "$out"
}

render() { # render FOLDER FIRST COUNT TASKS OPTION…: worlds into a cache, killed at $until
  local folder=$1 first=$2 count=$3 tasks=$4
  shift 4
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 XLA_PYTHON_CLIENT_PREALLOCATE=false timeout $((until - SECONDS > 1 ? until - SECONDS : 1)) \
    "${verb[@]}" prepare worlds --out "$folder" --latents --tasks "$tasks" --vae "$vae" --resolution "$res" --skip-bad \
    --start "$first" --count "$count" --workers 0 "$@" >>"$folder.log" 2>&1
}

lane() { # lane NUMBER TASKS OPTION…: a few worlds, then as many more as fit into the time by the speed of those, twice
  local number=$1 tasks=$2 first=$(((${FIRST:-0} + $1) * 1000000)) count=$sample begun took round
  shift 2
  for round in a b c; do
    begun=$SECONDS
    render "$work/worlds/$number-$round" "$first" "$count" "$tasks" "$@" || return
    took=$((SECONDS - begun > 7 ? SECONDS - begun - 6 : 1)) # starting takes some 6 s
    first=$((first + count)) count=$(((until - SECONDS - 6) * count * 9 / 10 / took))
    [ "$count" -ge 16 ] || return 0
  done
}

renders() { # of 16 cores 9 make depth, amodal and normals, 4 every task, 3 flow and amodal of things before a picture or a sky
  local until=$((SECONDS + ${RENDER:-$((budget * 3 / 5))})) number part
  rm -rf "$work/worlds"
  mkdir -p "$work/worlds" "$work/first"
  note "rendering worlds of $res pixels in $cores processes"
  render "$work/first/worlds" 0 8 depth,flow || { tail -n 5 "$work/first/worlds.log"; return 1; } # compiles the encoder
  for part in ${BESIDE:-}; do XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 $part; done >"$out/beside.log" 2>&1 &
  local beside=$! lanes=()
  for ((number = 1; number <= cores; number++)); do
    case $((number % 16)) in
      2 | 7) lane $number flow,amodal --option kind=wallpaper & ;;
      12) lane $number flow,amodal --option kind=sky & ;;
      0 | 1 | 5 | 10) lane $number depth,flow,amodal,normals & ;;
      *) lane $number depth,amodal,normals --option frames=1 & ;;
    esac
    lanes+=($!)
  done
  wait "${lanes[@]}"
  kill -TERM "$beside" 2>/dev/null
  cat "$work"/worlds/*.log >"$out/render.log"
}

finished() { # the caches that are complete, joined by colons
  python3 -c "
import glob, json, sys
rows = [(path, json.load(open(path))) for path in sorted(glob.glob(sys.argv[1] + '/*/ledger.json'))]
whole = [(path, row) for path, row in rows if row['complete']]
print('worlds:', sum(part['count'] for _, row in whole for part in row['settings']['sources'][:1]), file=sys.stderr)
print(':'.join(path.removesuffix('/ledger.json') for path, _ in whole))" "$work/worlds"
}

one_model() { # one_model SIZE[:STEPS] CACHES
  local size=${1%%:*} dim=128 depth=6 lr=2e-3 place run
  place=$work/$size-$res
  [ "$size" = small ] && dim=256 depth=8 lr=1.5e-3
  run=("${verb[@]}" train --config "configs/worlds.py:dim=$dim,depth=$depth,res=$res,batch=$batch,cache=$2,vae=$vae,lr=${LR:-$lr}")
  if [ "$size" != "$1" ]; then
    echo "${1#*:}" >"$place.steps"
  elif [ ! -f "$place.steps" ]; then # as many steps as there is time for, by the speed of a short run
    within 120 "${run[@]}" --workdir "$place-speed" --config.train.steps="$tries" --config.train.log_every=$((tries / 4)) \
      >"$out/speed-$size.log" 2>&1 || { tail -n 5 "$out/speed-$size.log"; return 1; }
    python3 -c "
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
seconds = min(row['seconds_per_step'] for row in rows if 'seconds_per_step' in row)
print(max(int((int(sys.argv[2]) - 100) * 0.92 / seconds), 20))  # 100 s: compiling, saving, evaluating" "$place-speed/metrics.jsonl" "$(left)" >"$place.steps"
  fi
  note "training $size for $(cat "$place.steps") steps"
  timeout -s TERM -k 25 $(($(left) > 60 ? $(left) - 35 : 15)) "${run[@]}" --workdir "$place" --config.train.steps="$(cat "$place.steps")" \
    >"$out/train-$size.log" 2>&1
  tail -n 2 "$out/train-$size.log"
  cp "$place/metrics.jsonl" "$out/metrics-$size.jsonl"
  [ -d "$place/model" ] || { note "$size is not finished: the same command with the same WORK goes on"; return 1; }
  rm -rf "${out:?}/$size" && cp -r "$place/model" "$out/$size"
}

model() {
  local size part res=${RES:-128} batch=${BATCH:-256} sample=256 tries=200 cores caches
  for size in ${SIZE:-mini}; do
    case ${size%%:*} in
      mini | small) ;;
      *) echo "$0: SIZE $size: give mini or small, or mini:STEPS" >&2; exit 2 ;;
    esac
  done
  cores=$(nproc)
  [ -z "${BESIDE:-}" ] || cores=$((cores - 1))
  [ "$device" = cpu ] && batch=${BATCH:-32} sample=8 tries=20
  [ -f "$work/worlds/done" ] || { renders && touch "$work/worlds/done"; }
  caches=$(finished)
  [ -n "$caches" ] || { note "no worlds were rendered in time"; return 1; }
  for size in ${SIZE:-mini}; do
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 one_model "$size" "$caches" &
  done
  wait
  for size in ${SIZE:-mini}; do
    size=${size%%:*}
    for task in depth flow amodal normals; do
      [ ! -d "$out/$size" ] || within 60 "${verb[@]}" evaluate --task $task --dataset worlds --split val --count 32 --model "$out/$size" \
        --steps 2 --ensemble 5 --json "$out/eval-$size-$task.json" --overwrite 2>&1 | tee "$out/eval-$size-$task.log" | tail -n 3
    done
  done
  ls -l "$out"
}

every_ablation() { # name, arguments of configs/worlds.py, flags
  echo "base"
  echo "base-2 - --config.seed=1"
  echo "depth-alone - --config.data.mixture.flow.weight=0 --config.data.mixture.amodal.weight=0 --config.data.mixture.normals.weight=0"
  echo "flow-alone - --config.data.mixture.depth.weight=0 --config.data.mixture.amodal.weight=0 --config.data.mixture.normals.weight=0"
  echo "rectified diffusion=rectified"
  echo "no-latent-norm - --config.latent_norm=none"
  echo "no-flip - --config.data.flip=false"
  echo "half-the-worlds worlds=half"
  echo "deep dim=96,depth=10"
  echo "wide dim=192,depth=3"
  echo "uniform-timesteps - --config.timestep_sampling=uniform"
  echo "adamw lr=1e-3 --config.optim.name=adamw"
  echo "small dim=256,depth=8,lr=1.5e-3"
}

ablation() { # ablation NAME ARGUMENTS FLAG…: one training and its evaluations
  local name=$1 words=${2:--} place=$work/ablations/$1 caches=$caches task
  shift $(($# > 1 ? 2 : 1))
  case $words in
    worlds=half) caches=$(tr : '\n' <<<"$caches" | awk 'NR % 2' | paste -sd:) words=- ;;
  esac
  [ "$words" = - ] && words=''
  within 300 "${verb[@]}" train --config "configs/worlds.py:res=${RES:-128},batch=$batch,cache=$caches,vae=$vae${words:+,$words}" \
    --workdir "$place" --config.train.steps="${STEPS:-4500}" "$@" >"$out/ablations/$name.log" 2>&1 ||
    { note "$name failed"; tail -n 3 "$out/ablations/$name.log"; return 1; }
  cp "$place/metrics.jsonl" "$out/ablations/$name.metrics.jsonl"
  measured "$name"
}

measured() { # measured NAME: what `ablation` and `one_step` trained
  local name=$1 task
  for task in depth flow amodal normals; do
    OMP_NUM_THREADS=2 within 120 "${verb[@]}" evaluate --task $task --dataset worlds --split val --count "${COUNT:-48}" \
      --model "$work/ablations/$name" --steps 1,2 --ensemble 5 --json "$out/ablations/$name-$task.json" --overwrite \
      >>"$out/ablations/$name.log" 2>&1
  done
  note "$name measured"
}

one_step() { # fine-tuning of `base` by its tasks' losses
  within 200 "${verb[@]}" train --config "configs/one_step.py:task=depth+flow+amodal+normals,init=$work/ablations/base/model,vae=$vae,cache=$caches,steps=${STEPS_LAST:-600},batch=64,lr=2e-4" \
    --workdir "$work/ablations/one-step" >"$out/ablations/one-step.log" 2>&1 || { tail -n 3 "$out/ablations/one-step.log"; return 1; }
  measured one-step
}

ablations() {
  local batch=${BATCH:-256} abreast=${ABREAST:-5} caches share
  share=$(awk "BEGIN {print 0.75 / $abreast}") # libraries take memory beside it
  [ "$device" = cpu ] && batch=${BATCH:-16}
  mkdir -p "$out/ablations" "$work/ablations"
  caches=$(finished)
  [ -n "$caches" ] || { note "no worlds: the part model, with the same WORK, renders them"; return 1; }
  note "ablations of ${STEPS:-4500} steps of $batch"
  while read -r name words flags; do
    # shellcheck disable=SC2053 # a pattern
    [[ $name == ${ONLY:-*} ]] || continue
    while [ "$(jobs -rp | wc -l)" -ge "$abreast" ]; do wait -n; done
    # shellcheck disable=SC2086 # the flags are several
    XLA_PYTHON_CLIENT_MEM_FRACTION=$share ablation "$name" ${words:+"$words"} $flags &
  done < <(every_ablation)
  wait
  # shellcheck disable=SC2053
  if [[ one-step == ${ONLY:-*} ]]; then XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 one_step; fi
  for place in "$work"/ablations/*/model; do
    [ -d "$place" ] && echo "$(basename "$(dirname "$place")")/model"
  done | tar -C "$work/ablations" -T - -czf "$work/ablations.tar.gz" && split -b 15M "$work/ablations.tar.gz" "$out/ablations.tar.gz."
  ls -l "$out"
}

for part in ${BESIDE:-} $parts; do
  case "$part" in
    tests | compiles | speed | study | model | ablations) ;;
    *) echo "$0: no part '$part': tests, compiles, speed, study, model, ablations" >&2; exit 2 ;;
  esac
done
for part in $parts; do $part; done
note "done"
