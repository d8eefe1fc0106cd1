# sourced by every script on the machine
export T=${T_DIR:-/root/T}
export OUT_T=${OUT_T:-/root/o/T}
export PYTHONPATH=$T/code:$T/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 MTR=$T
PY=${PY:-python3}
mkdir -p $OUT_T $T/logs $T/runs
