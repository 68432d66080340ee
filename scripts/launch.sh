# shellcheck shell=bash
# Sourced by the recipes: how one experiment is started, wherever it runs. The recipe sets
#   TOTAL_BATCH   clips per optimiser step, over all GPUs
#   BATCH_SIZE    clips per GPU at once; the environment's value wins
# and calls `pretrain FLAGS... "$@"`.
#
# From the environment:
#   DATA_PATH     list file of the training videos (needed; see DATASET.md)
#   OUTPUT_DIR    checkpoints and logs; default output/<folder>/<recipe>
#   DRY_RUN=1     print the command, run nothing
#   PYTHON        interpreter; default .venv/bin/python where it is there, else python3
# On one machine or several (torchrun; start the same recipe on every machine):
#   NPROC_PER_NODE  processes here, default one per GPU; NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
# In a SLURM job (srun; see scripts/slurm_pretrain.sh) the job's own variables say all of it.
#   LAUNCHER=torchrun|srun overrides the choice between the two.
#
# Fewer GPUs take the same optimiser steps: the clips that do not fit at once are accumulated
#   update_freq = TOTAL_BATCH / (GPUs x BATCH_SIZE)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RECIPE=$(basename "$(dirname "$0")")/$(basename "$0" .sh)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
fi

fail() {
    echo "$RECIPE: $*" >&2
    exit 1
}

# Sets `command` to what starts the processes and `gpus` to their number.
choose_torchrun() {
    local here=${NPROC_PER_NODE:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
    local nodes=${NNODES:-1}
    gpus=$((nodes * here))
    command=("$PYTHON" -m torch.distributed.run "--nproc_per_node=$here")
    if ((nodes == 1)); then
        command+=(--standalone)
        return
    fi
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes: set MASTER_ADDR to the address of the first machine"
    [[ -n ${NODE_RANK:-} ]] || fail "NNODES=$nodes: set NODE_RANK to this machine's number, 0 to $((nodes - 1))"
    command+=("--nnodes=$nodes" "--node_rank=$NODE_RANK")
    command+=("--master_addr=$MASTER_ADDR" "--master_port=${MASTER_PORT:-29500}")
}

choose_srun() {
    gpus=${SLURM_NTASKS:-$((${SLURM_NNODES:-1} * ${SLURM_NTASKS_PER_NODE:-0}))}
    ((gpus > 0)) || fail "the SLURM job names no tasks: give sbatch --ntasks-per-node=<GPUs of a node>"
    command=(srun "--ntasks=$gpus" --kill-on-bad-exit=1)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
    command+=("$PYTHON")
}

# Sets `update_freq`.
share_batch() {
    local at_once=$((gpus * BATCH_SIZE))
    ((TOTAL_BATCH % gpus == 0)) ||
        fail "$gpus GPUs cannot share a total batch of $TOTAL_BATCH: use a number of GPUs that divides it"
    ((TOTAL_BATCH % at_once == 0)) ||
        fail "$gpus GPUs x BATCH_SIZE=$BATCH_SIZE = $at_once does not divide the total batch of $TOTAL_BATCH:" \
            "set BATCH_SIZE to a divisor of $((TOTAL_BATCH / gpus))"
    update_freq=$((TOTAL_BATCH / at_once))
}

# launch PROGRAM FLAGS...: PROGRAM is relative to the repository; of a flag given twice the last one counts.
launch() {
    local launcher=torchrun program=$ROOT/$1 gpus update_freq command
    shift
    [[ -n ${DATA_PATH:-} ]] ||
        fail "DATA_PATH is not set: DATA_PATH=/path/to/train.csv bash scripts/$RECIPE.sh (DATASET.md has the format)"
    OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/output/$RECIPE}

    # Inside a step of srun (SLURM_STEP_ID) another srun would wait for the step's own resources for ever.
    if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then launcher=srun; fi
    case "${LAUNCHER:-$launcher}" in
        srun) choose_srun ;;
        torchrun) choose_torchrun ;;
        *) fail "LAUNCHER=$LAUNCHER: it is torchrun or srun" ;;
    esac
    share_batch

    command+=("$program" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR")
    command+=(--batch_size "$BATCH_SIZE" --update_freq "$update_freq" "$@")
    echo "$RECIPE: $gpus GPUs x $BATCH_SIZE clips x $update_freq accumulated = $TOTAL_BATCH" >&2
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}

# What all pre-training recipes share; weight decay 0.05, warm-up of 40 epochs, base learning rate 1.5e-4 (per 256
# clips) and AdamW are the program's defaults.
pretrain() { launch run_mae_pretraining.py --opt_betas 0.9 0.95 "$@"; }
