#!/usr/bin/env bash
# At most 7 minutes on one GPU. Writes to $OUT_NAME. Code: code2.tar.xz (after), code_before.tar.xz. Needs no assets.
here=$(cd "$(dirname "$0")" && pwd); cd "$here"
OUT=${OUT_NAME:?}; mkdir -p "$OUT"; began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/steps.txt"; }
mkdir -p after before && tar -xJf code2.tar.xz -C after && tar -xJf code_before.tar.xz -C before
cp after/experiments/families_gpu.py before/experiments/
SITE=$PYTHONPATH
export TRITON_CACHE_DIR="$here/triton2" OMP_NUM_THREADS=2
cat after/COMMIT before/COMMIT > "$OUT/versions.txt"; nvidia-smi --query-gpu=index,name,utilization.gpu,memory.used,clocks.sm --format=csv,noheader >> "$OUT/versions.txt"
cd after; export PYTHONPATH="$PWD:$SITE"
python3 -c "import torch, triton, platform; print(torch.cuda.get_device_name(), 'PyTorch', torch.__version__, 'Triton', triton.__version__, 'Python', platform.python_version())" >> "$OUT/versions.txt" 2>&1
PYTEST=(python3 -m pytest -q -p no:cacheprovider -m "gpu or not gpu" --timeout 120 --durations=5)
# 1. compile, and test the new kernels against float64
for part in tiles paths steps conv; do
  (timeout 110 python3 "$here/bench2.py" "$OUT/warm_$part.txt" "$here" $part warm > "$OUT/warm_$part.log" 2>&1) &
done
(NVIDIA_TF32_OVERRIDE=0 timeout 110 "${PYTEST[@]}" -n 5 tests/ops/gpu/test_grid_kernels.py tests/ops/test_scan_by_step.py > "$OUT/tests_grid_kernels.txt" 2>&1; say "grid kernels: $?") &
(NVIDIA_TF32_OVERRIDE=0 timeout 150 "${PYTEST[@]}" -n 6 tests/ops/gpu/test_families.py > "$OUT/tests_families2.txt" 2>&1; say "families: $?") &
wait
say "compiled and tested"
# 2. tune on a quiet GPU
for part in tiles steps conv paths; do timeout 30 python3 "$here/bench2.py" "$OUT/tuning.txt" "$here" $part > "$OUT/tuning_$part.log" 2>&1; say "tuning $part: $?"; done
python3 "$here/apply_best.py" . "$here"/best_*.json > "$OUT/applied.txt" 2>&1
# 3. before and after
(cd "$here/before"; PYTHONPATH="$PWD:$SITE" timeout 90 python3 experiments/families_gpu.py "$OUT/families_before2.json" --tables "$OUT/tables_before" --note before > "$OUT/before.log" 2>&1); say "before: $?"
timeout 90 python3 experiments/families_gpu.py "$OUT/families_after.json" --tables "$OUT/tables_after" --note after > "$OUT/after.log" 2>&1; say "after: $?"
left=$((420 - SECONDS + began)); [ $left -gt 15 ] && timeout $left python3 experiments/families_gpu.py "$OUT/families_mtr.json" --models vim_ti vim_s plainmamba_l1 vmamba_t mambavision_t --ratios 0.3 --tables "$OUT/tables_mtr" --note "mtr 0.3, after" > "$OUT/mtr.log" 2>&1; say "mtr: $?"
say "end"
