#!/bin/bash
# The life of one node, as process 1 of its namespaces: node.sh NAME FOLDER SHARED...
# /tmp, /run and /dev/shm are the node's own; of /tmp only the SHARED folders are everybody's, as on a cluster.
set -euo pipefail
name=$1 folder=$2
shift 2
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mkdir -p "$folder/tmp.$name" "$folder/run.$name/munge"
mount -t tmpfs -o mode=1777 tmpfs "$folder/tmp.$name"
mount -t tmpfs -o mode=755 tmpfs "$folder/run.$name"
mkdir "$folder/run.$name/munge" "$folder/run.$name/lock"
mount --bind /run/munge "$folder/run.$name/munge"
for shared; do
  case $shared in
    /tmp/*) mkdir -p "$folder/tmp.$name/${shared#/tmp/}" && mount --rbind "$shared" "$folder/tmp.$name/${shared#/tmp/}" ;;
  esac
done
mount --rbind "$folder/run.$name" /run
mount --rbind "$folder/tmp.$name" /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
slurmd -D -f "$SLURM_CONF" -N "$name" &
wait $! || true
while :; do sleep 1; done
