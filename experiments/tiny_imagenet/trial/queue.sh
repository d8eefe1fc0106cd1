#!/bin/bash
# The queue of a training: about 17 minutes on the GPUs named below, from the moment the data is there.
. $(dirname "$0")/env.sh
cd $T/code
MINUTES=${MINUTES:-17}; TEACHER_MINUTES=${TEACHER_MINUTES:-3.4}
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l); GPUS=${GPUS:-0}
if [ "$GPUS" -ge 4 ]; then : ${TEACHER_GPUS:=0,1,2,3} ${STUDENT_GPUS:=0,1} ${HALF_GPU:=2}
elif [ "$GPUS" = 3 ]; then : ${TEACHER_GPUS:=0,1,2} ${STUDENT_GPUS:=0,1} ${HALF_GPU:=2}
elif [ "$GPUS" = 2 ]; then : ${TEACHER_GPUS:=0,1} ${STUDENT_GPUS:=0} ${HALF_GPU:=1}
else : ${TEACHER_GPUS:=0} ${STUDENT_GPUS:=0} ${HALF_GPU:=0}; fi
BATCH_ALL=${BATCH_ALL:-512}
EXTRA=${STUDENT_EXTRA:-}       # only for the rehearsal
say() { echo "$(date -u +%T) +$((SECONDS))s $*"; echo "$*" > $T/state; }
count() { echo "$1" | tr ',' '\n' | wc -l; }
DEADLINE=$((SECONDS + ${MINUTES%.*} * 60))
if [ -e $T/probe.pid ] && [ "${KEEP_PROBE:-0}" = 0 ]; then for i in $(seq 20); do [ -e $T/probe.pid ] && sleep 1; done; [ -e $T/probe.pid ] && kill -TERM -- -$(cat $T/probe.pid); fi

say "unpacking"
[ -e $T/data/complete ] || { $PY $T/data.py $T/pieces $T/data && touch $T/data/complete; } || { say "DATA FAILED"; exit 1; }
rm -rf $T/probe/data
setsid $PY $T/keep.py > $T/logs/keep.log 2>&1 < /dev/null &
KEEP=$!

say "teacher"
NT=$(count $TEACHER_GPUS)
TEACHER=null
for try in 1 2; do
  b=$((BATCH_ALL / NT)); b=$((b / 2 * 2)); rm -rf $T/teacher
  m=$TEACHER_MINUTES; e=; [ $try = 2 ] && { m=2.4; e=--eager; }
  CUDA_VISIBLE_DEVICES=$TEACHER_GPUS timeout ${TEACHER_LIMIT:-300} $PY experiments/tiny_imagenet/train_teacher.py $T/data $T/teacher --devices $NT --batch $b --minutes $m $e ${TEACHER_EXTRA:-} \
    > $T/logs/teacher_$try.log 2>&1
  [ -e $T/teacher/model.safetensors ] && { TEACHER=local-dir:$T/teacher; break; }
  say "teacher try $try failed"; [ $SECONDS -gt 150 ] && break
done
# the teacher's share of the loss: more if it is a good one
TOP1=$($PY -c "
import json
rows=json.load(open('$T/teacher/teacher.json'))['rows']
print([r['val_top1'] for r in rows if 'val_top1' in r][-1])" 2>/dev/null || echo 0)
SHARE=${SHARE:-$($PY -c "print(0.7 if $TOP1 >= 0.53 else 0.5)")}
say "teacher $TEACHER top-1 $TOP1, share $SHARE"

# epochs from the time left: fine-tuning, start-ups and a margin set aside
epochs() {  # seconds of an epoch -> epochs, and how often to validate so that the last one is
  $PY -c "
e = max(int(($DEADLINE - $SECONDS - ${RESERVE:-75} - 9 * $1) / $1), 3)
print(*next((n, v) for n in range(e, 0, -1) for v in (10, 9, 11, 8, 12, 7, 3, 2, 1) if n % v == 0 and (v > 3 or n < 10)))"
}
train() {  # name of the run, backbone, GPUs, further settings
  local name=$1 backbone=$2 gpus=$3; shift 3
  local n=$(count $gpus) resume dist try
  for try in 1 2 3; do
    dist="trainer=default trainer.devices=1"; [ $n -gt 1 ] && dist="trainer=ddp trainer.devices=$n"
    resume=; [ -e $T/runs/$name/last.ckpt ] && resume="training.resume=$T/runs/$name/last.ckpt"
    CUDA_VISIBLE_DEVICES=$gpus $PY -m mtr_lab.train experiment=tiny_imagenet backbone=$backbone dataset.root=$T/data "training.teacher=$TEACHER" \
      training.distillation=$SHARE $dist dataset.batch_size=$((BATCH_ALL / (2 * n) * 2 * n)) trainer.enable_progress_bar=false hydra.run.dir=$T/runs/$name "$@" $EXTRA $resume \
      > $T/logs/${name}_$try.log 2>&1
    [ -e $T/runs/$name/training.json ] && return 0
    say "$name: try $try failed"
    [ $try = 2 ] && [ ! -e $T/runs/$name/last.ckpt ] && { gpus=${gpus%%,*}; n=1; }
  done
  return 1
}
measured() {  # seconds of an epoch as the probe measured it on two GPUs, else the figure of the last training
  $PY - "$1" <<'X'
import csv, os, sys
default = float(sys.argv[1])
try:
    rate = max(float(r["img_per_s"]) for r in csv.DictReader(open(os.environ["T"] + "/probe/run/metrics.csv")))
    seconds = 58368 / rate * default / 7.9 + 0.35
    print(round(seconds if 0.6 * default < seconds < 1.5 * default else default, 2))
except Exception:
    print(default)
X
}
both() {  # backbone, GPUs, seconds of an epoch
  local e v main=$1 tuned=$1_tuned
  read e v <<< "$(epochs $3)"
  say "$1: $e epochs of $3 s on GPUs $2"
  train $main $1 $2 training.epochs=$e trainer.check_val_every_n_epoch=$v training.ema_decay=0.998 || return
  local left=$((DEADLINE - SECONDS))
  local f=$($PY -c "print(max(min(int(($left - 32) / $3), 10), 0))")
  say "$1: $f epochs of fine-tuning"
  [ $f -ge 3 ] && train $tuned $1 $2 backbone.checkpoint=$T/runs/$main/model.safetensors training.epochs=$f training.lr=1.5e-4 training.warmup_epochs=1 training.ema_decay=0.99 \
    training.mixup=0 training.cutmix=0 "dataset.train_transform.scale=[0.6,1.0]" trainer.check_val_every_n_epoch=1
  say "$1: training done"
}
NS=$(count $STUDENT_GPUS)
DEFAULT=$($PY -c "print({1: 16.0, 2: 7.9, 3: 5.5, 4: 4.3}[$NS])")
both vim_ti_64_half $HALF_GPU ${HALF_SECONDS:-$(measured 8.4)} &
HALF=$!
both vim_ti_64 $STUDENT_GPUS ${STUDENT_SECONDS:-$(measured $DEFAULT)}
say "choosing by the held-out images, then the validation images of the chosen weights, once"
$PY $T/choose.py vim_ti_64
evaluate() {  # name, GPU
  CUDA_VISIBLE_DEVICES=$2 timeout 150 $PY -m mtr_lab dataset=tiny_imagenet backbone=$1 backbone.checkpoint=$T/final/$1/model.safetensors dataset.root=$T/data dataset.num_workers=8 \
    timing.batch_size=0 mtr.ratio=0.4 reduction=mtr trainer.enable_progress_bar=false hydra.run.dir=$T/runs/$1_val ${EVAL_EXTRA:-} > $T/logs/$1_val.log 2>&1
}
evaluate vim_ti_64 ${STUDENT_GPUS%%,*}
wait $HALF
$PY $T/choose.py vim_ti_64_half
evaluate vim_ti_64_half $HALF_GPU
kill $KEEP 2>/dev/null; sleep 1
$PY $T/keep.py once
say "ALL DONE"
