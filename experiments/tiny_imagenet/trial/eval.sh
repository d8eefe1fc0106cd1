#!/bin/bash
# Every line on final/model.safetensors, when it is there; lanes over all GPUs, the most important first, until EVAL_END seconds after START. `eval.sh cache`: only the cache of decoded images.
. $(dirname "$0")/env.sh
W=$T/eval; D=$T/eval/data
mkdir -p $W/logs $W/out $D; cd $T/code
export OMP_NUM_THREADS=2
if [ "$1" = cache ]; then
  $PY - <<'Y'
import os, tarfile
T = os.environ["T"]
with tarfile.open(f"{T}/small.tar.xz") as archive:
    archive.extractall(f"{T}/eval/data", filter="data")
Y
  [ -e $D/tiny/val ] || ln -s $T/data/val $D/tiny/val
  ls -d $D/tiny/* $D/hold/*
  timeout 200 nice -n 10 $PY -m mtr_lab experiment=tiny_policies hydra.mode=RUN dataset.root=$D/tiny backbone=vim_ti_64 backbone.checkpoint=${START_WEIGHTS:-$T/start.safetensors} dataset.num_workers=8 dataset.cache=$W/cache \
    trainer.accelerator=cpu trainer.limit_test_batches=1 trainer.enable_progress_bar=False reduction=mtr mtr.ratio=0.5 hydra.run.dir=$W/cache_run ${EXTRA2:-}
  echo "cache rc $?"; exit 0
fi
GPUS=${GPUS:-1}; LIMIT=$((START + EVAL_END))
S=$W/sweep/vim_ti_64; F=$T/final/model.safetensors
COMMON="backbone=vim_ti_64 backbone.checkpoint=$F dataset.num_workers=2 dataset.cache=$W/cache trainer.enable_progress_bar=False ${EXTRA2:-}"
FULL="dataset.root=$D/tiny $COMMON"
e() { local t=$((LIMIT - $(date +%s))); [ $t -gt 5 ] && timeout $t $PY $T/evaluate.py $F "$@"; }
policies() { e -m experiment=tiny_policies $FULL hydra.sweep.dir=$S "$@"; }
pictures() { e -m experiment=tiny_pictures $FULL hydra.sweep.dir=$S "$@"; }
lane() { # number: its runs, the most important first
  case $1 in
  1) policies reduction=fovea,mtr,write ;;
  2) policies reduction=resolution,random,adjacent ;;
  3) policies reduction=rmeeto,utr,storm ;;
  4) policies reduction=mtr mtr.schedule=auto ;;
  5) pictures reduction=resolution,fovea,write ;;
  6) pictures reduction=mtr,random ; policies reduction=mtr mtr.merge=prune ;;
  7) policies reduction=mtr mtr.score=random,class_token,b,c ;;
  8) policies reduction=random 'mtr.seed=range(1,4)' ;;
  9) policies reduction=random 'mtr.seed=range(4,7)' ;;
  10) policies reduction=random 'mtr.seed=range(7,10)' ;;
  11) policies reduction=resolution mtr.ratio=null 'mtr.resolution=[52,56,60,68,72,76,80]' ; policies reduction=mtr mtr.order=importance ;;
  12) e -m experiment=tiny_policies $COMMON dataset.root=$D/hold hydra.sweep.dir=$W/sweep/vim_ti_64_hold dataset.test_split=train dataset.include=${HOLD:-experiments/tiny_imagenet/holdout.txt} \
       reduction=resolution mtr.ratio=null 'mtr.resolution=[52,56,60,68,72,76,80]' ; policies reduction=storm_evit,storm_random ;;
  13) policies reduction=hsa,tome,famba ;;
  14) policies reduction=evit,pumer ;;
  15) policies reduction=mtr mtr.schedule=dtp ; policies reduction=mtr mtr.score=b,c mtr.merge=prune ;;
  16) policies reduction=mtr mtr.score=random,class_token mtr.merge=prune ;;
  esac
}
for i in ${LANES:-1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16}; do CUDA_VISIBLE_DEVICES=$(((i - 1) % GPUS)) lane $i > $W/logs/lane$i.log 2>&1 & done
for i in $(seq 300); do [ -e $F ] && break; sleep 1; done
SECONDS=0
while [ -n "$(jobs -r)" ]; do sleep 10; echo "T evaluation $SECONDS s: $(ls $S/*/result.json 2>/dev/null | wc -l) of 43 runs"; done
mkdir -p $S/vim_ti_64_half; cp $T/half_result.json $S/vim_ti_64_half/result.json   # quoted: its weights are gone
grep -hE "^mtr_lab:|Error" $W/logs/*.log | sort | uniq -c | head -5
cd $W
(cd sweep && find . -name result.json -printf "%P\0" | sort -z | tar cJf ../out/results.tar.xz --null -T -) &
cd $T/code && timeout 60 $PY experiments/what_holds.py collect $S $W/out/vim_ti_64.npz || echo "T: COLLECT FAILED"
wait
tar cf $OUT_T/.eval.part -C $W/out . && mv $OUT_T/.eval.part $OUT_T/eval.tar && echo "evaluated: $(ls $S/*/result.json | wc -l) of 44 results, $SECONDS s, $(stat -c %s $OUT_T/eval.tar) bytes"
