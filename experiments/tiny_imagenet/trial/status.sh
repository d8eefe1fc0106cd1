#!/bin/bash
# A few lines: state, newest rows, errors; restarts a queue that has died before its end.
. $(dirname "$0")/env.sh
echo "T +$(($(date +%s) - $(cat $T/start)))s: $(cat $T/state 2>/dev/null) | $(grep -h "'epoch'" $T/logs/teacher_?.log 2>/dev/null | tail -1 | cut -c1-130)"
for r in a b; do f=$T/runs/$r/metrics.csv; [ -e $f ] && echo "T $r: $(tail -1 $f | cut -d, -f1,3,4,5) val $(awk -F, '$7!=""{v=$7}END{print v}' $f) $(grep -h ' epochs$' $T/logs/${r}_?.log | tail -1)"; done
cat $T/final/chosen 2>/dev/null; [ -e $T/logs/eval.log ] && tail -1 $T/logs/eval.log
grep -ahoE '[A-Za-z]*Error[^"]{0,90}' $T/logs/*.log 2>/dev/null | tail -2
if [ -e $T/queue.pid ] && ! kill -0 $(cat $T/queue.pid) 2>/dev/null && ! grep -q "ALL DONE" $T/state; then
  echo "T: THE QUEUE HAD DIED, starting it again"; setsid bash $T/queue.sh >> $T/logs/queue.log 2>&1 < /dev/null & echo $! > $T/queue.pid
fi
ls -la $OUT_T 2>/dev/null | awk '$5>100 && $9!~/^\./{print $5, $9}' | tr '\n' ' '; echo
