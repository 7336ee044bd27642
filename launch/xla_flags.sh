#!/usr/bin/env bash
# The compiler flags of each platform, for the other scripts: `xla_flags cpu|gpu|tpu` exports them.
# What XLA_FLAGS or LIBTPU_INIT_ARGS already hold comes after them, and so wins.

xla_flags() {
  local flags
  case "${1:-}" in
    cpu)
      # XLA ends a process if one of its devices comes 40 s late to a collective: too soon for
      # several processes on few cores.
      flags="--xla_cpu_collective_call_terminate_timeout_seconds=300"
      export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
      ;;
    gpu)
      # Reductions of gradients start as soon as they can and run beside the backward pass.
      flags="--xla_gpu_enable_latency_hiding_scheduler=true"
      # A CNN has a hundred small gradients: up to 128 MiB of them share one reduction's latency.
      flags+=" --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
      export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
      ;;
    tpu)
      # All-gathers of a teacher that is split over the chips run beside the layers before them.
      flags="--xla_tpu_enable_async_collective_fusion=true"
      flags+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
      flags+=" --xla_tpu_overlap_compute_collective_tc=true"
      export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
      ;;
    *)
      echo "xla_flags: unknown platform '${1:-}'; known: cpu, gpu, tpu." >&2
      return 2
      ;;
  esac
}
