#!/usr/bin/env bash
# At most 9 minutes (8 without a slow compiler) on GPU $GPU, ports on two GPUs ($GPU and $SECOND, default 1) for 60 seconds. Writes to $OUT_NAME.
# Needs the assets of the checkout that travels (mtr_lab/assets: 2 files, 1 folder): found by search, or ASSETS=FOLDER.
here=$(cd "$(dirname "$0")" && pwd); cd "$here"
OUT=${OUT_NAME:?}; GPU=${GPU:-2}; mkdir -p "$OUT"
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*" | tee -a "$OUT/steps.txt"; }
mkdir -p code && tar -xJf code.tar.xz -C code
if [ -z "$ASSETS" ]; then
  for found in $(timeout 40 find / -xdev \( -path /proc -o -path /sys -o -path "$here" \) -prune -o -type f -path '*/mtr_lab/assets/vim_nano.safetensors' -print 2>/dev/null); do
    ASSETS=$(dirname "$found"); [ -d "$ASSETS/imagenette_sample" ] && break
  done
fi
say "assets: $ASSETS"
[ -n "$ASSETS" ] && cp -rn "$ASSETS"/. code/mtr_lab/assets/
cd code
export PYTHONPATH="$PWD:$PYTHONPATH" CUDA_VISIBLE_DEVICES=$GPU NVIDIA_TF32_OVERRIDE=0 OMP_NUM_THREADS=2 NCCL_NVLS_ENABLE=0
export TRITON_CACHE_DIR="$here/triton" TORCHINDUCTOR_CACHE_DIR="$here/inductor" HYDRA_FULL_ERROR=0
python3 - <<'PY' > "$OUT/versions.txt" 2>&1
import platform, torch, triton
from importlib.metadata import version
print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "Triton", triton.__version__, "Python", platform.python_version())
for name in ("pytest", "mpi4py", "lightning", "timm", "hydra-core", "hypothesis", "pytest-xdist"):
    try: print(name, version(name))
    except Exception as error: print(name, "missing", error)
PY
cat COMMIT >> "$OUT/versions.txt"; uptime >> "$OUT/versions.txt"
nvidia-smi --query-gpu=index,utilization.gpu,memory.used,clocks.sm --format=csv,noheader > "$OUT/gpus_before.txt"
PYTEST=(python3 -m pytest -q -p no:cacheprovider -m "gpu or not gpu" --timeout 150 --durations=5)

# 1. decisions, neighbours, plans; 2. torch.compile and CUDA graphs of all families; at once, and the package compiles
(timeout 150 "${PYTEST[@]}" -n 5 tests/ops/gpu/test_neighbour_kernels.py tests/ops/gpu/test_decision.py tests/ops/test_neighbours.py tests/ops/test_plan.py tests/ops/test_asymmetric_plan.py tests/ops/test_pairs.py > "$OUT/tests_neighbours.txt" 2>&1; say "neighbours: $?") &
neighbours=$!
(timeout 200 "${PYTEST[@]}" -n 7 tests/ops/gpu/test_families.py > "$OUT/tests_families.txt" 2>&1; say "families: $?") &
families=$!
(NVIDIA_TF32_OVERRIDE=0 timeout 330 python3 experiments/exports_gpu.py "$OUT/exports_gpu.json" > "$OUT/exports_gpu.log" 2>&1; say "exports: $?") &
exports=$!
for part in check steps conv tiles0 tiles1 tiles2 tiles3; do  # compile the new kernels
  (timeout 280 python3 "$here/bench.py" "$OUT/warm_$part.txt" "$here" $part warm > "$OUT/warm_$part.log" 2>&1) &
done
wait $neighbours
# 4. ports, on two GPUs
(CUDA_VISIBLE_DEVICES=$GPU,${SECOND:-1} timeout 170 python3 experiments/listening.py "$OUT/listening.json" > "$OUT/listening.log" 2>&1; say "listening: $?") &
listening=$!
(timeout 120 "${PYTEST[@]}" -n 3 tests/test_distributed.py -k "loopback or mpi or nccl or kill or averaged or gathered" > "$OUT/tests_distributed.txt" 2>&1; say "distributed: $?") &
distributed=$!
# 5. tests that need a GPU
wait $families
(timeout 120 python3 -m pytest -q -p no:cacheprovider -m gpu --continue-on-collection-errors --timeout 100 --durations=5 -n 5 tests --ignore tests/ops/gpu/test_families.py --ignore tests/backbones/test_golden.py > "$OUT/tests_gpu.txt" 2>&1; say "-m gpu: $?") &
marked=$!
wait $distributed $marked $exports $listening
# 6. where the time of the other families goes (shared GPU: kernels' shares, not speeds)
env -u NVIDIA_TF32_OVERRIDE timeout 80 python3 experiments/families_gpu.py "$OUT/families_before.json" --tables "$OUT/tables_before" --note "beside training" > "$OUT/families.log" 2>&1; say "families_gpu: $?"
for part in check steps conv tiles0 tiles1 tiles2 tiles3; do
  timeout 25 python3 "$here/bench.py" "$OUT/bench.txt" "$here" $part > "$OUT/bench_$part.log" 2>&1
done; say "bench"
# 7. the other kernels
left=$((470 - SECONDS + began)); [ $left -gt 20 ] || left=20
timeout $left "${PYTEST[@]}" -n 10 tests/ops --ignore tests/ops/gpu/test_families.py --ignore tests/ops/gpu/test_neighbour_kernels.py --ignore tests/ops/gpu/test_decision.py --ignore tests/ops/gpu/test_compiles.py > "$OUT/tests_ops.txt" 2>&1; say "ops: $?"
nvidia-smi --query-gpu=index,utilization.gpu,memory.used,clocks.sm --format=csv,noheader > "$OUT/gpus_after.txt"
say "end"
