#!/bin/bash
# ~8 minutes on a part of one H100. Needs beside it: code.tar.xz, *.whl (or PYTHONPATH with hydra etc.), small.tar.xz, tiny_imagenet_val.tar.xz,
# vim_ti_64.safetensors, vim_ti_64_half.safetensors. Results to $OUT_T: results2.tar.xz (result.json of every run), vim_ti_64.npz, vim_ti_64.json, logs.
H=$(cd "$(dirname "$0")" && pwd)
OUT_T=${OUT_T:-$H/out}; PY=${PY:-python3}; W=${W:-work2}
mkdir -p $OUT_T $W/logs $W/code; cd $W
[ -e code/mtr_lab ] || tar xJf $H/code.tar.xz -C code
$PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $W/site $H/*.whl 2>/dev/null || echo "wheels failed"
export PYTHONPATH=$W/code:$W/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
git config --global --add safe.directory $W/code
mkdir -p /tmp/data /tmp/runs/vim_ti_64 /tmp/runs/vim_ti_64_half
[ -e /tmp/data/tiny/val ] || $PY - $H <<'X'
import sys, tarfile
for name, to in (("small.tar.xz", "/tmp/data"), ("tiny_imagenet_val.tar.xz", "/tmp/data/tiny")):
    with tarfile.open(f"{sys.argv[1]}/{name}") as archive:
        archive.extractall(to, filter="data")
X
cp $H/vim_ti_64.safetensors /tmp/runs/vim_ti_64/model.safetensors
cp $H/vim_ti_64_half.safetensors /tmp/runs/vim_ti_64_half/model.safetensors
cd $W/code
COMMON="dataset.num_workers=4 dataset.cache=/tmp/cache trainer.enable_progress_bar=False ${EXTRA2:-}"
FULL="backbone=vim_ti_64 backbone.checkpoint=/tmp/runs/vim_ti_64/model.safetensors dataset.root=/tmp/data/tiny $COMMON"
S=$W/sweep/vim_ti_64
e() { timeout ${LIMIT2:-300} $PY -m mtr_lab "$@"; }
policies() { e -m experiment=tiny_policies $FULL hydra.sweep.dir=$S "$@"; }
lane() { # number: its runs, the most important first
  case $1 in
  1) policies reduction=fovea,mtr,write,random,rmeeto ;;
  2) policies reduction=resolution,utr,hsa,tome,famba,evit ;;
  3) policies reduction=pumer,storm,storm_evit,storm_random,adjacent ;;
  4) policies reduction=random 'mtr.seed=range(1,10)' ;;
  5) policies reduction=mtr mtr.score=random,class_token,b,c mtr.merge=mean,prune ;;
  6) e -m experiment=tiny_policies backbone=vim_ti_64_half backbone.checkpoint=/tmp/runs/vim_ti_64_half/model.safetensors dataset.root=/tmp/data/tiny $COMMON hydra.sweep.dir=$S reduction=resolution mtr.ratio=0.5
     policies reduction=resolution mtr.ratio=null 'mtr.resolution=[52,56,60,68,72,76,80]'
     e experiment=tiny_pictures $FULL hydra.sweep.dir=$S
     policies reduction=mtr mtr.merge=prune; policies reduction=mtr mtr.order=importance ;;
  7) e -m experiment=tiny_policies backbone=vim_ti_64 backbone.checkpoint=/tmp/runs/vim_ti_64/model.safetensors dataset.root=/tmp/data/hold $COMMON hydra.sweep.dir=$W/sweep/vim_ti_64_hold dataset.test_split=train \
       dataset.include=experiments/tiny_imagenet/holdout.txt reduction=resolution mtr.ratio=null 'mtr.resolution=[52,56,60,68,72,76,80]'
     policies reduction=mtr mtr.schedule=auto,dtp ;;
  esac
}
e experiment=tiny_policies hydra.mode=RUN $FULL reduction=mtr mtr.ratio=0.5 hydra.run.dir=$W/first > $W/logs/first.log 2>&1; tail -8 $W/logs/first.log   # fills the cache
for i in ${LANES:-1 2 3 4 5 6 7}; do lane $i > $W/logs/lane$i.log 2>&1 & done
wait
echo "lanes done $SECONDS s: $(ls $S/*/result.json | wc -l) runs of 45"; grep -hE "^mtr_lab:|Error" $W/logs/*.log | sort | uniq -c | head
(cd $W/sweep && find . -name result.json -printf "%P\0" | tar cJf $OUT_T/results2.tar.xz --null -T -)
timeout 120 $PY experiments/what_holds.py collect $S $OUT_T/vim_ti_64.npz && timeout 200 $PY experiments/what_holds.py compare $OUT_T/vim_ti_64.npz $OUT_T/vim_ti_64.json
tar cJf $OUT_T/logs2.tar.xz -C $W logs
echo "run2 done $SECONDS s"; ls -la $OUT_T
