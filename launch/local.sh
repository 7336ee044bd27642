#!/usr/bin/env bash
# Starts a run with N processes on this machine:
#
#   launch/local.sh [OPTIONS] N ARGUMENTS OF xkd_jax.main
#   launch/local.sh 2 --config configs/cifar100_32.py:smoke --workdir runs/two
#   launch/local.sh --platform gpu 8 --config configs/imagenet.py
#
# SIGTERM and Ctrl-C are forwarded to all of them. With --platform gpu, process i uses GPU i; a
# single `python -m xkd_jax.main` uses all GPUs too, but decodes images in one process.
#
#   --platform cpu|gpu   (default: cpu)
#   --port PORT          port of process 0 (default: a free one)
#   --dry_run            print the commands, don't run them

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/xla_flags.sh
platform=cpu port=""
parse_options "platform port" "$@"
count=${rest[0]:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "the number of processes is missing; try local.sh 2 ..."
xla_flags "$platform"
python=${PYTHON:-python}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${port:-$("$python" -c "$free_port")}

set -m # each child in its own process group, so that it gets Ctrl-C only once
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
    echo "local.sh: process $i exited with code $code." >&2
    exit_code=$code
  fi
done
exit "$exit_code"
