# sourced by every script on the machine
export T=${T_DIR:-work}
export OUT_T=${OUT_T:-out}
export PYTHONPATH=$T/code:$T/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 MTR=$T
export TINY_IMAGENET_DIR=$T/data
PY=${PY:-python3}
mkdir -p $OUT_T $T/logs $T/runs
