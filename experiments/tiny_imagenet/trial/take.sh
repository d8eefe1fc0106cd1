#!/bin/bash
# Takes the archives and weights that lie beside the scripts or in ../T.c1, ../T.c2.
H=${1:-$(cd "$(dirname "$0")" && pwd)}
. $H/env.sh
for f in $H/*.tar.xz $H/../T.c?/*.tar.xz; do case $f in */tiny_imagenet_*) [ -e $f ] && cp $f $T/archives/;; esac; done
for f in $H/start.safetensors $H/../T.c?/start.safetensors; do [ -e $f ] && cp $f $T/start.safetensors; done
for d in $H/../T.c?/given; do [ -d $d ] && { mkdir -p $T/given; cp -r $d/* $T/given/; }; done
echo "T: $(ls $T/archives | tr '\n' ' ') $(ls $T/start.safetensors 2>/dev/null)"
