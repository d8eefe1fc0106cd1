#!/usr/bin/env bash
# At most 8 minutes on GPU $GPU. Writes to $OUT_NAME.
here=$(cd "$(dirname "$0")" && pwd); cd "$here"
OUT=${OUT_NAME:?}; mkdir -p "$OUT" code; export OUT_NAME=$OUT
tar -xJf code.tar.xz -C code
export PYTHONPATH="$here/code:$PYTHONPATH" CUDA_VISIBLE_DEVICES=${GPU:-3} OMP_NUM_THREADS=2
export TRITON_CACHE_DIR="$here/triton"
began=$SECONDS; LIMIT=${LIMIT:-470}
step() { # name, seconds, command
  local left=$((LIMIT - (SECONDS - began))) most=$2
  [ $left -lt 15 ] && { echo "$1: no time left" >> "$OUT/steps.txt"; return; }
  [ $most -gt $left ] && most=$left
  local name=$1; shift 2
  timeout -k 5 "$most" "$@" > "$OUT/$name.log" 2>&1
  echo "$name: exit $? at $((SECONDS - began)) s" | tee -a "$OUT/steps.txt"
}
nvidia-smi --query-gpu=index,name,utilization.gpu,memory.used,clocks.sm,power.draw --format=csv,noheader > "$OUT/gpus.txt"
cat code/COMMIT >> "$OUT/gpus.txt"
step check 90 python3 measure.py check
step kernels 170 python3 measure.py kernels
step models 150 python3 measure.py models
step profile 90 python3 measure.py profile
if [ -z "$ASSETS" ]; then
  for found in $(timeout 40 find / -xdev \( -path /proc -o -path /sys -o -path "$here" \) -prune -o -type f -path '*/mtr_lab/assets/vim_nano.safetensors' -print 2>/dev/null); do
    ASSETS=$(dirname "$found"); [ -d "$ASSETS/imagenette_sample" ] && break
  done
fi
[ -n "$ASSETS" ] && cp -rn "$ASSETS"/. code/mtr_lab/assets/
step bf 60 python3 bf.py code/mtr_lab/assets/imagenette_sample
STAGES=2 step kernels2 40 python3 measure.py kernels
step tests 60 python3 -m pytest -q -x -p no:cacheprovider code/tests/ops/gpu/test_scan.py code/tests/ops/gpu/test_model.py
exit 0
