#!/usr/bin/env bash
# At most 9 minutes, on two CPU cores only (no GPU): figures of the CPU backend on a quiet host. Writes to $OUT_NAME.
here=$(cd "$(dirname "$0")" && pwd); cd "$here"
OUT=${OUT_NAME:-$here/out}; mkdir -p "$OUT" code
tar -xJf code.tar.xz -C code
n=$(nproc); CORES=${CORES:-$((n-2)),$((n-1))}
export PYTHONPATH="$here/code:$PYTHONPATH" CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2
PY="taskset -c $CORES ${PYTHON:-python3}"
began=$SECONDS; LIMIT=${LIMIT:-530}
step() { local left=$((LIMIT - (SECONDS - began))) most=$2 name=$1; [ $left -lt 10 ] && return; [ $most -gt $left ] && most=$left; shift 2
  timeout -k 5 "$most" "$@" > "$OUT/$name.log" 2>&1; echo "$name: exit $? at $((SECONDS - began)) s, load $(cut -d' ' -f1-3 /proc/loadavg)" | tee -a "$OUT/steps.txt"; }
{ lscpu; nproc; cat /proc/loadavg; ls /usr/lib/x86_64-linux-gnu/libgomp*; } > "$OUT/cpu.txt" 2>&1
if [ ! -d code/mtr_lab/assets/imagenette_sample ]; then
  for found in $(timeout 40 find / -xdev \( -path /proc -o -path /sys -o -path "$here" \) -prune -o -type f -path '*/mtr_lab/assets/vim_nano.safetensors' -print 2>/dev/null); do
    A=$(dirname "$found"); [ -d "$A/imagenette_sample" ] && { mkdir -p code/mtr_lab/assets; cp -rn "$A"/imagenette_sample "$A"/vim_nano.safetensors code/mtr_lab/assets/; break; }
  done
fi
cd code
step warm 120 $PY ../variant.py warm=1
step base2 30 $PY ../variant.py threads=2
step vim_cpu 200 $PY experiments/vim_cpu.py 1 2
cp experiments/results/vim_cpu.json "$OUT"/ 2>/dev/null
step onnx1 60 $PY ../onnx_ratio.py 1
step families 120 $PY experiments/families_cpu.py
cp experiments/results/families_cpu.json "$OUT"/ 2>/dev/null
step latency 115 $PY -m mtr_lab.bench bench.device=cpu 'bench.policy=[none,mtr,fovea,resolution]' 'bench.ratio=[0.2,0.3,0.4,0.5]' 'bench.batch=[1]' bench.seconds=80 hydra.run.dir="$OUT/bench"
cp "$OUT/bench/bench.json" "$OUT/latency_cpu.json" 2>/dev/null
for v in "share=0" "threads=2" "pool=one" "pool=one spin=20000" "spin=20000" "numba=1" "pool=one spin=1000" "threads=1"; do
  step "v_${v// /_}" 40 $PY ../variant.py $v
done
step onnx2 60 $PY ../onnx_ratio.py 2
cat /proc/loadavg >> "$OUT/cpu.txt"
