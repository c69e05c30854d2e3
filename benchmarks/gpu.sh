#!/usr/bin/env bash
# What only a GPU can tell, on one H100 or H200 with PyTorch 2.11 or later, in runs of at most ten minutes:
#
#     benchmarks/gpu.sh [--dry] [--output FOLDER] [--data FOLDER] [--budget SECONDS]
#
# Each step runs by itself, with a limit, and writes FOLDER/STEP.log; results are lines of JSON in FOLDER/*.jsonl. A step that
# has ended is not run again, and one that trains goes on where it was saved: run the same command again for what is left. What
# torch.compile compiles, which may take longer than a limit, is measured apart, and comes last the next time if it was killed.
# --dry tries every script on a CPU, on the smallest networks: about two minutes of one core. PYTHON names another python.

set -u
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python} out=gpu-results data=shared/cifar10 budget=580 dry= patience=1
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1 budget=3000 patience=10 ;; # other things may run on the same cores
        --output) out=$2 && shift ;;
        --data) data=$2 && shift ;;
        --budget) budget=$2 && shift ;;
        *) echo "unknown: $1" >&2 && exit 2 ;;
    esac
    shift
done
mkdir -p "$out"
export PYTHONPATH=src:benchmarks${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(cd "$out" && pwd)/compiled} # what was killed goes on from there
names=() again= before=" $(cd "$out" && ls -- *.killed 2>/dev/null | tr '\n' ' ')"

# step NAME SECONDS COMMAND…
step() {
    local name=$1 limit=$(($2 * patience)) left=$((budget - SECONDS)) code began=$SECONDS was_killed=
    shift 2
    case $before in *" $name.killed "*) was_killed=1 ;; esac
    [ "$was_killed" = "$again" ] || return # its turn is in the other round
    names+=("$name")
    if [ -e "$out/$name.done" ]; then echo "$name: done before" && return; fi
    if [ "$left" -lt 5 ]; then echo "$name: no time left" && return; fi
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then touch "$out/$name.done" && echo "$name: done in $((SECONDS - began)) s" && return; fi
    [ $code -ne 124 ] || [[ $name = train-* ]] || touch "$out/$name.killed"
    echo "$name: failed ($code) after $((SECONDS - began)) s, see $out/$name.log"
}

# together SECONDS METHOD…: trainings side by side, each a step of its own
together() {
    local limit=$1 method
    shift
    for method in "$@"; do
        (step "train-$method" "$limit" "$python" -m equinorm train --preset conv "${training[@]}" --methods "$method" --seeds 1 \
            --select-epochs 0 --lrs 0.05 --workers 1 --results "$out/conv-$method.jsonl" --picture "$out/conv-$method.png") &
        names+=("train-$method")
    done
    wait
}

# costs plain|compiled: of a step, and beside normalization
costs() {
    local network
    for network in "${networks[@]}"; do
        step "step-$network-$1" 60 "$python" benchmarks/training_step.py --device $device --networks "$network" --hooks "$1" \
            --dtypes float32 --decays 0 --rounds $rounds "${small[@]}" --output "$out/step.jsonl"
    done
    for network in "${normed[@]}"; do
        step "norms-$network-$1" 60 "$python" benchmarks/training_step.py --norms --device $device --normed "$network" \
            --hooks "$1" --batch $batch --size $size --rounds $rounds "${small[@]}" --output "$out/norms.jsonl"
    done
}

# waits plain|compiled
waits() {
    step "waits-$1" 60 "$python" benchmarks/synchronisation.py --device $device --hooks "$1" --output "$out/synchronisation.jsonl"
}

everything() {
    local file
    for file in "${tests[@]}"; do
        step "tests-$file" 80 env EQUINORM_DEVICE=$device "$python" -m pytest -q -p no:cacheprovider -m "not slow" \
            "tests/training/test_$file.py" "${chosen[@]}"
    done
    [ -n "$dry" ] || { costs plain && waits plain; }
    step billion 60 "$python" benchmarks/balancing.py --device $device --plain --networks mlp --sizes $weights --dtypes float32 \
        --norms 2 --tols 1e-6 --output "$out/convergence.jsonl"
    costs compiled
    waits compiled
    [ -n "$again" ] || together 400 "${methods[@]}"
}

if [ -n "$dry" ]; then
    device=cpu networks=(fc) rounds=2 batch=2 size=32 weights=1e5 normed=(resnet18) small=(--width 8)
    tests=(optimizers) chosen=(-k "capturable and AdamW")
    training=(--set data=digits --set width=2 --set augment=0 --epochs 1) methods=(baseline enorm_bn)
else
    device=cuda networks=(fc conv resnet18 resnet50 vit) rounds=30 batch=64 size=224 weights=1e9 normed=(resnet18 resnet50) small=()
    tests=(optimizers optimizers_of_today several_optimizers enorm) chosen=()
    training=(--data "$data" --device cuda --set bfloat16=1 --set compiled=1) methods=(baseline bn gn enorm enorm_bn)
fi

everything
again=1
everything
failed=()
for name in "${names[@]}"; do [ -e "$out/$name.done" ] || failed+=("$name"); done
[ ${#failed[@]} -eq 0 ] && echo "all done: $out" && exit 0
echo "left: ${failed[*]}"
exit 1
