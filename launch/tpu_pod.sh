#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: requests it, trains, deletes it; again after each preemption:
#
#   launch/tpu_pod.sh --name a --zone us-west4-a --accelerator v5litepod-16 --workdir /mnt/runs/a \
#     -- --config configs/imagenet.py
#
# The script requests a queued resource, waits for it, copies this repository to all its hosts, runs
# the same command on each (JAX detects the other hosts), and deletes the resource at the end. The
# output of each host is in logs/NAME.
#
#   --name NAME          name of the queued resource and its node
#   --zone ZONE          its zone
#   --accelerator TYPE   such as v5litepod-16
#   --runtime VERSION    (default: v2-alpha-tpuv5-lite)
#   --workdir FOLDER     the run's folder, on a file system that all hosts mount
#   --setup COMMAND      run on each host first, such as a mount (default: nothing)
#   --spot true|false    cheaper, but can be preempted (default: true)
#   --dry_run            print the commands of a run without preemption

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
name="" zone="" accelerator="" runtime=v2-alpha-tpuv5-lite workdir="" setup=: spot=true
parse_options "name zone accelerator runtime workdir setup spot" "$@"
required name zone accelerator workdir
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

on_all_hosts() {
  execute "${vm[@]}" ssh "$name" --zone "$zone" --worker all --output-directory "logs/$name" \
    --command "$1"
}

state() {
  "${queue[@]}" describe "$name" --zone "$zone" --format "value(state.state)" 2>/dev/null ||
    echo NONE
}

create() {
  local options=(--zone "$zone" --node-id "$name" --accelerator-type "$accelerator"
    --runtime-version "$runtime")
  [[ $spot == true ]] && options+=(--spot)
  execute "${queue[@]}" create "$name" "${options[@]}"
}

wait_for_hosts() {
  until [[ $(state) == ACTIVE ]]; do
    [[ $(state) != FAILED ]] || fail "the request failed; see gcloud's description of $name."
    sleep 30
  done
}

delete() {
  execute "${queue[@]}" delete "$name" --zone "$zone" --force --quiet
}

train() {
  local command="cd xkd_jax && source launch/xla_flags.sh && xla_flags tpu && launch/until_done.sh"
  command+=" $(quoted "$workdir" python -m xkd_jax.main --workdir "$workdir" "${rest[@]}")"
  execute "${vm[@]}" scp --recurse . "$name:xkd_jax" --zone "$zone" --worker all &&
    on_all_hosts "$setup && pip install -q -e xkd_jax 'jax[tpu]'" &&
    on_all_hosts "$command"
}

execute mkdir -p "logs/$name"
while true; do
  if $dry_run || [[ $(state) == NONE ]]; then create; fi
  $dry_run || wait_for_hosts
  code=0
  train || code=$?
  ((code == 0)) || sleep 60 # a preempted resource is still listed as active for a moment
  if ((code == 0)) || [[ $(state) == ACTIVE ]]; then
    delete
    exit "$code"
  fi
  delete
done
