#!/usr/bin/env bash
# One recipe as a SLURM job, one task per GPU; further arguments go to the program:
#
#   DATA_PATH=/path/to/train.csv sbatch scripts/slurm.sh scripts/ssv2/pretrain_adamae_base_800e.sh
#   DATA_PATH=... sbatch --nodes=1 scripts/slurm.sh scripts/ssv2/pretrain_adamae_base_800e.sh --num_workers 8
#   DATA_PATH=... MODEL=... sbatch --nodes=1 scripts/slurm.sh scripts/ssv2/finetune_adamae_base_800e_50e.sh
#
# With fewer GPUs than the recipe's, gradient accumulation keeps the total batch. A job that is requeued goes on from
# its last checkpoint. Partition, account and time limit are the cluster's: give them to sbatch.
#SBATCH --job-name=video-mae
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if (($# == 0)); then
    echo "slurm.sh: name the recipe to run, for instance scripts/ssv2/pretrain_adamae_base_800e.sh" >&2
    exit 1
fi
exec bash "$@"
