#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, from the request to the end, and again after each preemption:
#
#   launch/tpu_pod.sh --name a --zone us-west4-a --accelerator v5litepod-16 --workdir /mnt/runs/a \
#     -- --config configs/imagenet.py
#
# It asks for a queued resource, waits for it, copies this repository to all its hosts, starts the
# same command on each (JAX finds the others by itself), and deletes the resource at the end. Each
# host's output is in logs/NAME.
#
#   --name NAME          of the queued resource and its node
#   --zone ZONE
#   --accelerator TYPE   such as v5litepod-16
#   --runtime VERSION    (v2-alpha-tpuv5-lite)
#   --workdir FOLDER     of the run, on a file system that all hosts mount
#   --setup COMMAND      run on each host first, such as a mount (:)
#   --spot true|false    cheaper, and preempted at times (true)
#   --dry_run            prints the commands, without those after a preemption

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
    [[ $(state) != FAILED ]] || fail "the request failed; see gcloud's describe."
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
  ((code == 0)) || sleep 60 # what is preempted still counts as active for a moment
  if ((code == 0)) || [[ $(state) == ACTIVE ]]; then
    delete
    exit "$code"
  fi
  delete
done
