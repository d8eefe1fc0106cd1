#!/bin/bash
# While the second half of the data travels: unpacks the first, imports (byte code), a few steps of the teacher and of stage A on one GPU. Ends by itself or when the queue begins.
. $(dirname "$0")/env.sh
cd $T/code
echo $$ > $T/probe.pid
P=$T/probe; mkdir -p $P
$PY -c "import hydra, omegaconf, timm, lightning, torch; print('T: imports', torch.__version__, timm.__version__, torch.cuda.is_available(), torch.cuda.device_count())"
$PY $T/data.py $T/archives $T/data
export CUDA_VISIBLE_DEVICES=0
timeout 60 $PY experiments/tiny_imagenet/train_teacher.py $T/data $P/teacher --batch 128 --epochs 2 --steps 10 --workers 8 ${PROBE_TEACHER:-} > $T/logs/probe_teacher.log 2>&1
grep -h "'epoch'" $T/logs/probe_teacher.log | tail -1
timeout 60 $PY $T/student.py $(date +%s -d "+40 seconds") experiment=tiny_imagenet dataset.root=$T/data dataset.test_split=train training.teacher=local-dir:$P/teacher training.epochs=2 training.warmup_epochs=0 dataset.num_workers=8 \
  trainer.limit_train_batches=20 trainer.limit_val_batches=1 trainer.enable_progress_bar=false dataset.batch_size=96 hydra.run.dir=$P/run reduction=resolution mtr.resolution=56 mtr.ratio=null ${STUDENT_EXTRA:-} > $T/logs/probe_student.log 2>&1
echo "probe student rc $?"; tail -2 $P/run/metrics.csv; grep -hE "Error" $T/logs/probe_*.log | tail -2
rm -f $T/probe.pid
