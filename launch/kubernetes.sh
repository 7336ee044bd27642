#!/usr/bin/env bash
# Starts a run as a Kubernetes JobSet (jobset.sigs.k8s.io must be installed in the cluster):
#
#   launch/kubernetes.sh --name a --image IMAGE --claim runs --nodes 4 -- --config configs/imagenet.py
#   launch/kubernetes.sh --name a --image IMAGE --claim runs --nodes 4 --platform tpu --devices 4 \
#     --accelerator tpu-v5-lite-podslice --topology 4x4 -- --config configs/imagenet.py
#
# One process per node. An evicted pod saves a checkpoint and fails; all pods then restart and
# resume.
#
#   --name NAME          name of the JobSet; the run's folder is /runs/NAME
#   --image IMAGE        container image with this repository installed, as its working directory
#   --claim NAME         PersistentVolumeClaim (ReadWriteMany) that is mounted at /runs
#   --nodes N            number of nodes (default: 1)
#   --platform gpu|tpu   (default: gpu)
#   --devices N          devices per node (default: 8)
#   --accelerator TYPE   GKE's name of the TPU type; with --platform tpu
#   --topology AxB       its topology; with --platform tpu
#   --restarts N         maximum number of restarts (default: 100)
#   --dry_run            print the JobSet, don't apply it

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
name="" image="" claim="" nodes=1 platform=gpu devices=8 accelerator="" topology="" restarts=100
parse_options "name image claim nodes platform devices accelerator topology restarts" "$@"
required name image claim
port=8476
case "$platform" in
  gpu) resource=nvidia.com/gpu selector="{}" ;;
  tpu)
    required accelerator topology
    resource=google.com/tpu
    selector="{cloud.google.com/gke-tpu-accelerator: $accelerator,"
    selector+=" cloud.google.com/gke-tpu-topology: $topology}"
    ;;
  *) fail "unknown platform '$platform'; known: gpu, tpu." ;;
esac

jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $nodes
          parallelism: $nodes
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector: $selector
              containers:
                - name: train
                  image: "$image"
                  ports:
                    - containerPort: $port
                  command: [bash, -c]
                  args:
                    - >-
                      source launch/xla_flags.sh && xla_flags $platform &&
                      exec launch/until_done.sh /runs/$name
                      python -m xkd_jax.main $(quoted --workdir "/runs/$name" "${rest[@]}")
                      --coordinator $name-workers-0-0.$name:$port
                      --num_processes $nodes --process_id "\$JOB_COMPLETION_INDEX"
                  resources:
                    limits:
                      $resource: $devices
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $claim
                - name: shared-memory
                  emptyDir:
                    medium: Memory
END
}

if $dry_run; then jobset; else jobset | kubectl apply -f -; fi
