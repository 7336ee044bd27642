#!/usr/bin/env bash
# XLA flags for each platform, for the other scripts: `xla_flags cpu|gpu|tpu` exports them. Flags
# that are already in XLA_FLAGS or LIBTPU_INIT_ARGS come after them, and so take precedence.

xla_flags() {
  local flags
  case "${1:-}" in
    cpu)
      # XLA terminates a process if one of its devices is 40 s late for a collective: too soon for
      # several processes on few cores.
      flags="--xla_cpu_collective_call_terminate_timeout_seconds=300"
      export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
      ;;
    gpu)
      # Gradient reductions start as early as possible and overlap with the backward pass.
      flags="--xla_gpu_enable_latency_hiding_scheduler=true"
      # A CNN has a hundred small gradients: combine up to 128 MiB of them in one reduction.
      flags+=" --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
      export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
      ;;
    tpu)
      # All-gathers of a teacher that is sharded over the chips overlap with the preceding layers.
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
