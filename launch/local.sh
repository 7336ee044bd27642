#!/usr/bin/env bash
# Starts N processes of one run on this machine:
#
#   launch/local.sh [OPTIONS] N ARGUMENTS OF xkd_jax.main
#   launch/local.sh 2 --config configs/cifar100_32.py:smoke --workdir runs/two
#   launch/local.sh --platform gpu 8 --config configs/imagenet.py
#
# SIGTERM and Ctrl-C reach all of them. With --platform gpu, process i has GPU i; a single
# `python -m xkd_jax.main` takes all GPUs too, but decodes images in one process.
#
#   --platform cpu|gpu   what to run on (cpu)
#   --port PORT          of process 0 (a free one)
#   --dry_run            prints the commands

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/xla_flags.sh
platform=cpu port=""
parse_options "platform port" "$@"
count=${rest[0]:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "the number of processes is missing, such as local.sh 2."
xla_flags "$platform"
python=${PYTHON:-python}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${port:-$("$python" -c "$free_port")}

set -m # each in a group of its own, so that Ctrl-C comes once
for ((i = 0; i < count; i++)); do
  command=("$python" -m xkd_jax.main "${rest[@]:1}" --coordinator "127.0.0.1:$port"
    --num_processes "$count" --process_id "$i")
  [[ $platform == gpu ]] && command=(env "JAX_LOCAL_DEVICE_IDS=$i" "${command[@]}")
  if $dry_run; then
    quoted "${command[@]}"
  else
    "${command[@]}" &
    children+=($!)
  fi
done

forward_signals
exit_code=0
for i in "${!children[@]}"; do
  code=0
  wait_for "${children[i]}" || code=$?
  if ((code)); then
    echo "local.sh: process $i ended with code $code." >&2
    exit_code=$code
  fi
done
exit "$exit_code"
