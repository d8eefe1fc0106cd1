#!/bin/bash
# 10 minutes at most on one H100: tiles of the new kernels, latencies before and after, tests, compute-sanitizer.
cd "$(dirname "$0")"; H=$PWD; O=$OUT_NAME; mkdir -p "$O"; began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$O/steps.txt"; }
mkdir -p before after; tar xJf code.tar.xz -C after; tar xJf main.tar.xz -C before
export TRITON_CACHE_DIR=$H/triton OMP_NUM_THREADS=2
BASE=$PYTHONPATH
nvidia-smi --query-gpu=name,utilization.gpu,memory.used,clocks.sm --format=csv,noheader > "$O/gpus.txt"; cat after/COMMIT before/COMMIT >> "$O/gpus.txt"
PYTHONPATH=$H/before:$BASE timeout 120 python3 -u latency.py "$O/before.json" before vim_s 1 60 > "$O/before.log" 2>&1 &
first=$!
PYTHONPATH=$H/after:$BASE timeout 240 python3 -u tune.py "$O" "$H/after" > "$O/tune.log" 2>&1; say "tune $?"
wait $first
grep -n "^CHANNELS\|^UNROLL\|^MAX\|^FEW\|^TOKENS" after/mtr_lab/ops/gpu/{scan_together,read_together,project_few,mixer_read,decision,neighbours}.py > "$O/constants.txt"
lat() { PYTHONPATH=$H/$1:$BASE timeout $5 python3 -u latency.py "$O/$2.json" $1 $3 $4 $(($5 - 15)) > "$O/$2.log" 2>&1; say "$2 $?"; }
lat after after_1 vim_s 1 60
lat before before_1 vim_s 1 60
lat after after_few vim_s,vim_nano,vim_ti 1,2,4,8 70
lat before before_few vim_s,vim_nano,vim_ti 1,2,4,8 70
# Tests and sanitizers, at once
cd after
(PYTHONPATH=$H/after:$BASE timeout 170 python3 -m pytest -q -p no:cacheprovider -m "gpu or not gpu" -n 8 tests/ops/gpu/test_scan_together.py tests/ops/gpu/test_project_few.py tests/ops/gpu/test_mixer_read_alone.py tests/ops/gpu/test_decision.py tests/ops/gpu/test_neighbour_kernels.py tests/ops/gpu/test_scan.py tests/ops/test_mixer.py tests/ops/test_mixer_read.py > "$O/tests.txt" 2>&1; say "tests $?") & a=$!
cd ..
(PYTHONPATH=$H/after:$BASE timeout 150 compute-sanitizer --tool memcheck python3 sanitize.py > "$O/memcheck.txt" 2>&1; say "memcheck $?") & b=$!
(PYTHONPATH=$H/after:$BASE timeout 150 compute-sanitizer --tool racecheck python3 sanitize.py > "$O/racecheck.txt" 2>&1; say "racecheck $?") & c=$!
wait $a $b $c
lat after after_many vim_s 16,32 40
lat before before_many vim_s 16,32 40
say done
