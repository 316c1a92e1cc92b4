#!/usr/bin/env bash
# Two nodes under Slurm: sbatch cookbook/distributed/slurm.sh RUN.yaml [a.b=c ...]
# The working folder, the data, data.cache and out are on a file system that both nodes see.
#SBATCH --job-name=prefopt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300                # the run finishes its step and saves; submit again to go on (--resume)
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_endpoint "${nodes%%$'\n'*}:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m prefopt train "$@" --resume
