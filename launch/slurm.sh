#!/usr/bin/env bash
# Submits a run on one or more GPU nodes to SLURM:
#
#   launch/slurm.sh --nodes 4 --gpus 8 --workdir /shared/runs/a -- --config configs/imagenet.py
#
# One process per GPU; JAX detects the processes through SLURM. Five minutes before the time limit,
# or on preemption, SIGTERM makes the run save a checkpoint and exit; the job is then requeued until
# the run is complete.
#
#   --workdir FOLDER     the run's folder, on a file system that all nodes share
#   --nodes N            number of nodes (default: 1)
#   --gpus N             GPUs per node (default: 8)
#   --cpus N             CPUs per process (default: 8)
#   --time LIMIT         time limit of each job (default: 24:00:00)
#   --partition NAME     SLURM's partition
#   --account NAME       SLURM's account
#   --setup COMMAND      run first, such as 'source venv/bin/activate'
#   --dry_run            print the job script, don't submit it

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
workdir="" nodes=1 gpus=8 cpus=8 time=24:00:00 partition="" account="" setup=:
parse_options "workdir nodes gpus cpus time partition account setup" "$@"
required workdir

script() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$(basename "$workdir")
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$(basename "$workdir")-%j.log
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}set -euo pipefail
cd $(quoted "$PWD")
$setup
source launch/xla_flags.sh
xla_flags gpu
srun --kill-on-bad-exit=1 python -m xkd_jax.main $(quoted --workdir "$workdir" "${rest[@]}")
# Interrupted training exits with 0 too, but only complete training writes the report.
[[ -e $(quoted "$workdir")/report.md ]] || scontrol requeue "\$SLURM_JOB_ID"
END
}

if $dry_run; then script; else script | sbatch; fi
