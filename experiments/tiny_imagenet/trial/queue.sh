#!/bin/bash
# The queue: teacher, stage A at 56², stage B at 64², choice by the held-out images, every line on the validation images. By deadlines in seconds since its first start.
# Started again after a break it goes on where it was: $T/start has its first start.
. $(dirname "$0")/env.sh
cd $T/code
[ -e $T/start ] || date +%s > $T/start
START=$(cat $T/start)
now() { echo $(($(date +%s) - START)); }
say() { echo "$(date -u +%T) +$(now)s $*"; echo "+$(now)s $*" > $T/state; }
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}; [ "$GPUS" -ge 1 ] || GPUS=1
case $GPUS in 1) t=260;; 2) t=190;; *) t=140;; esac
TEACHER_END=${TEACHER_END:-$t} A_END=${A_END:-590} B_END=${B_END:-655} EVAL_START=${EVAL_START:-690} EVAL_END=${EVAL_END:-880}
[ -e $T/probe.pid ] && { kill -TERM -- -$(cat $T/probe.pid) 2>/dev/null; rm -f $T/probe.pid; }
say "$GPUS GPUs"
$PY $T/data.py $T/archives $T/data || { say "DATA FAILED"; [ -e $T/data/train_1.complete ] || exit 1; }
[ -e $T/keep.pid ] && kill $(cat $T/keep.pid) 2>/dev/null
setsid $PY $T/keep.py > $T/logs/keep.log 2>&1 < /dev/null & echo $! > $T/keep.pid
BATCH=${BATCH:-512}; STUDENT_BATCH=${STUDENT_BATCH:-384}
START_WEIGHTS=${START_WEIGHTS:-$T/start.safetensors}
TEACHER=local-dir:$T/teacher; [ -e $T/teacher.failed ] && TEACHER=null

launch() {  # name, try, seconds of its end, settings: begins a student in the background; PID
  local name=$1 try=$2 end=$((START + $3)) resume= n; shift 3
  if [ -e $T/runs/$name/last.ckpt ]; then
    n=$($PY -c "import torch; print(torch.load('$T/runs/$name/last.ckpt', 'cpu', weights_only=True)['settings']['training.epochs'])")
    resume="training.epochs=$n training.resume=$T/runs/$name/last.ckpt"
  fi
  local run="$PY" dist="trainer.devices=1"
  [ $GPUS -gt 1 ] && { run="$PY -m torch.distributed.run --standalone --nproc-per-node=$GPUS"; dist="trainer=ddp trainer.devices=$GPUS"; }
  timeout $((end - $(date +%s) + 40)) $run $T/student.py $end experiment=tiny_imagenet dataset.root=$T/data dataset.test_split=train "training.teacher=$TEACHER" $dist \
    dataset.batch_size=$STUDENT_BATCH dataset.num_workers=${WORKERS:-12} trainer.enable_progress_bar=false hydra.run.dir=$T/runs/$name "$@" ${STUDENT_EXTRA:-} $resume > $T/logs/${name}_$try.log 2>&1 &
  PID=$!
}
finish() {  # name, PID of its first try, seconds of its end, settings: waits, and tries again from the last checkpoint
  local name=$1 end=$3 try; PID=$2; shift 3
  for try in 2 3 4 5; do
    wait $PID
    [ -e $T/runs/$name/model.safetensors ] && return 0
    say "$name failed: $(grep -hE 'Error|error' $T/logs/${name}_*.log | tail -1 | cut -c1-160)"
    [ $(now) -gt $((end - 15)) ] && break
    [ $try = 3 ] && [ ! -e $T/runs/$name/last.ckpt ] && break
    launch $name $try $end "$@"
  done
  [ -e $T/runs/$name/model.safetensors ] || { [ -e $T/runs/$name/last.ckpt ] && $PY $T/keep.py $T/runs/$name; }   # the average of the last epoch
}
A="backbone.checkpoint=$START_WEIGHTS training.lr=${LR_A:-1.2e-3} training.warmup_epochs=2 training.ema_decay=0.998 training.epochs=${EPOCHS_A:-110} trainer.check_val_every_n_epoch=20"
R="reduction=resolution mtr.resolution=56 mtr.ratio=null"
B="backbone.checkpoint=$T/runs/a/model.safetensors training.lr=1.5e-4 training.warmup_epochs=0 training.ema_decay=0.99 training.epochs=${EPOCHS_B:-10} training.mixup=0.2 training.cutmix=0
  dataset.train_transform.scale=[0.6,1.0] trainer.check_val_every_n_epoch=50"

# 1. teacher; stage A is imported meanwhile
if [ ! -e $T/teacher.done ] && [ ! -e $T/teacher.failed ]; then
  say "teacher"
  mkdir -p $T/teacher
  WAIT_FOR=$T/teacher.done launch a 1 $A_END $A $R; APID=$PID
  for try in 1 2; do
    m=$($PY -c "print(round(max($TEACHER_END - $(now) - 10, 50) / 60, 2))"); e=; [ $try = 2 ] && { [ $(now) -gt 240 ] && break; m=1; e=--eager; }
    timeout $($PY -c "print(int($m * 60 + 60))") $PY experiments/tiny_imagenet/train_teacher.py $T/data $T/teacher --devices $GPUS --batch $((BATCH / GPUS)) --minutes $m ${TEACHER_EXTRA:-} > $T/logs/teacher_$try.log 2>&1
    [ -e $T/teacher/teacher.json ] && break
  done
  if [ -e $T/teacher/teacher.json ]; then touch $T/teacher.done
  else
    say "TEACHER FAILED"; kill $APID; touch $T/teacher.failed; TEACHER=null; launch a 1 $A_END $A $R; APID=$PID
  fi
  say "teacher: $(grep -h val_top1 $T/logs/teacher_?.log 2>/dev/null | tail -1 | cut -c1-120)"
elif [ -e $T/runs/a/model.safetensors ]; then true & APID=$!
else launch a 9 $A_END $A $R; APID=$PID
fi

# 2. stage A at 56²; stage B is imported meanwhile, the cache of validation images filled
say "stage A"
WAIT_FOR=$T/runs/a/model.safetensors launch b 1 $B_END $B; BPID=$PID
bash $T/eval.sh cache > $T/logs/cache.log 2>&1 &
finish a $APID $A_END $A $R
[ -e $T/runs/a/model.safetensors ] || [ $(now) -gt $((A_END - 60)) ] || { launch a 6 $A_END $A backbone.img_size=56; finish a $PID $A_END $A backbone.img_size=56; }
say "stage A done: $(tail -1 $T/runs/a/metrics.csv | cut -c1-120)"

# 3. stage B at 64²; A on the held-out images meanwhile; the evaluation is imported
say "stage B"
CUDA_VISIBLE_DEVICES=$((GPUS - 1)) timeout 60 $PY -m mtr_lab dataset=tiny_imagenet backbone=vim_ti_64 backbone.checkpoint=$T/runs/a/model.safetensors dataset.root=$T/data dataset.num_workers=4 timing.batch_size=0 \
  mtr.ratio=0.4 reduction=mtr trainer.precision=bf16-mixed trainer.enable_progress_bar=false dataset.test_split=train dataset.include=${HOLD:-$T/code/experiments/tiny_imagenet/holdout.txt} hydra.run.dir=$T/runs/a_held \
  ${EVAL_EXTRA:-} > $T/logs/a_held.log 2>&1 &
EVAL_END=$EVAL_END START=$START GPUS=${EVAL_GPUS:-$GPUS} setsid bash $T/eval.sh > $T/logs/eval.log 2>&1 < /dev/null &
EVAL=$!
( while [ $(now) -lt $EVAL_START ] && kill -0 $BPID 2>/dev/null; do sleep 1; done; kill $BPID 2>/dev/null ) &   # B ends by then, whatever it has
[ -e $T/runs/a/model.safetensors ] && finish b $BPID $B_END $B || kill $BPID

# 4. choice; eval.sh begins when final/model.safetensors is there
$PY $T/choose.py; say "chosen: $(cat $T/final/chosen), evaluation"
wait $EVAL
say "ALL DONE: $(cat $T/final/chosen) $(tail -1 $T/logs/eval.log)"
sleep 1; kill $(cat $T/keep.pid) 2>/dev/null; $PY $T/keep.py once
