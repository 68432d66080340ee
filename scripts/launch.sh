# shellcheck shell=bash
# Sourced by the recipes: launches one experiment with torchrun or srun. The recipe sets
#   TOTAL_BATCH   videos per optimiser step, over all GPUs; empty if nothing is trained
#   BATCH_SIZE    per-GPU batch in videos; the environment overrides it
# and calls `pretrain`, `finetune`, `probe` or `evaluate` with FLAGS... "$@".
#
# From the environment:
#   DATA_PATH     list of training videos; except for `pretrain` the folder of train.csv, val.csv and test.csv
#                 (required; see DATASET.md)
#   MODEL         except for `pretrain`: the checkpoint to start from or to test, or org/name on the Hugging Face hub
#                 (required; see FINETUNE.md); for `finetune` also timm:NAME or scratch, by default the last checkpoint
#                 of its own pre-training recipe
#   DATA_SET      another data set of the table in datasets.py than the recipe's, such as Kinetics-600
#   OUTPUT_DIR    checkpoints and logs; default output/<folder>/<recipe>[-<DATA_SET>][-seed<SEED>]
#   SEED          overrides the program's default seed; {seed} in MODEL and OUTPUT_DIR stands for it
#   DRY_RUN=1     prints the command, runs nothing
#   PYTHON        interpreter; default .venv/bin/python if it exists, else python3
# On one or several machines (torchrun, but for one process alone; run the same recipe on every machine):
#   NPROC_PER_NODE  processes on this machine, default one per GPU; NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#   MAX_RESTARTS    how often all processes are restarted from the last checkpoint after one dies; default 0
# In a SLURM job (srun; see scripts/slurm.sh) the job's own variables are used. After a signal the processes save and
# exit with status 75 one by one, so srun must not kill the others with the first (--kill-on-bad-exit); after a
# failure they exit within --dist_timeout, or --wait seconds after the first has exited.
#   LAUNCHER=torchrun|srun overrides the choice between the two; LAUNCHER=none starts one process by itself.
#
# With fewer GPUs the optimiser steps stay the same, through gradient accumulation:
#   update_freq = TOTAL_BATCH / (GPUs x BATCH_SIZE)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RECIPE=$(basename "$(dirname "$0")")/$(basename "$0" .sh)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
fi
MODEL=${MODEL:-} OUTPUT_DIR=${OUTPUT_DIR:-}
MODEL=${MODEL//\{seed\}/${SEED:-}} OUTPUT_DIR=${OUTPUT_DIR//\{seed\}/${SEED:-}}
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$ROOT/.venv/ffmpeg" # for torchcodec, see env.sh

fail() {
    echo "$RECIPE: $*" >&2
    exit 1
}

# Sets `command` to the launcher's command line and `gpus` to the number of processes.
choose_torchrun() {
    local here=${NPROC_PER_NODE:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
    local nodes=${NNODES:-1}
    gpus=$((nodes * here))
    command=("$PYTHON")
    # One process needs no launcher, and keeps its exit status; torchrun buries its message under a trace.
    if ((gpus == 1 && ${MAX_RESTARTS:-0} == 0)) && [[ -z ${SLURM_JOB_ID:-} ]]; then return; fi
    command+=(-m torch.distributed.run "--nproc_per_node=$here" "--max_restarts=${MAX_RESTARTS:-0}")
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
    ((gpus > 0)) || fail "the SLURM job sets no number of tasks: pass --ntasks-per-node=<GPUs per node> to sbatch"
    command=(srun "--ntasks=$gpus" --kill-on-bad-exit=0 --wait=120)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
    command+=("$PYTHON")
}

# Sets `update_freq`, and `batch` to a description of the batch of one step.
share_batch() {
    local at_once=$((gpus * BATCH_SIZE))
    update_freq=1
    batch="$gpus GPU$( ((gpus == 1)) || echo s) x $BATCH_SIZE videos"
    if [[ -z $TOTAL_BATCH ]]; then return; fi
    ((TOTAL_BATCH % gpus == 0)) ||
        fail "$gpus GPUs cannot share a total batch of $TOTAL_BATCH: use a number of GPUs that divides it"
    ((TOTAL_BATCH % at_once == 0)) ||
        fail "$gpus GPUs x BATCH_SIZE=$BATCH_SIZE = $at_once does not divide the total batch of $TOTAL_BATCH:" \
            "set BATCH_SIZE to a divisor of $((TOTAL_BATCH / gpus))"
    update_freq=$((TOTAL_BATCH / at_once))
    batch+=" x $update_freq accumulated = $TOTAL_BATCH"
}

# launch PROGRAM FLAGS...: PROGRAM is relative to the repository; if a flag is repeated, the last one counts.
launch() {
    local launcher=torchrun program=$ROOT/$1 gpus update_freq batch command
    shift
    [[ -n ${DATA_PATH:-} ]] ||
        fail "DATA_PATH is not set: the list of pre-training videos, or else the folder of train.csv, val.csv and" \
            "test.csv (DATASET.md)"
    [[ -e $DATA_PATH ]] || fail "DATA_PATH=$DATA_PATH does not exist"
    if [[ $program == */run_mae_pretraining.py ]]; then
        [[ ! -d $DATA_PATH ]] || fail "DATA_PATH=$DATA_PATH is a folder: set it to the list of pre-training videos"
    elif [[ $program == */run_class_finetuning.py ]]; then
        [[ ! -f $DATA_PATH ]] ||
            fail "DATA_PATH=$DATA_PATH is a file: set it to a folder of train.csv, val.csv and test.csv"
    fi
    OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/output/$RECIPE${DATA_SET:+-$DATA_SET}${SEED:+-seed$SEED}}

    # Inside an srun step (SLURM_STEP_ID) another srun would wait forever for the step's own resources.
    if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then launcher=srun; fi
    case "${LAUNCHER:-$launcher}" in
        srun) choose_srun ;;
        torchrun) choose_torchrun ;;
        none) gpus=1 command=("$PYTHON") ;;
        *) fail "LAUNCHER=$LAUNCHER: it is torchrun, srun or none" ;;
    esac
    share_batch

    command+=("$program" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --log_dir "$OUTPUT_DIR")
    # No recipe is meant for the CPU, which the program's --device auto takes where a driver is missing.
    command+=(--device cuda --batch_size "$BATCH_SIZE" --update_freq "$update_freq" "$@")
    if [[ -n ${SEED:-} ]]; then command+=(--seed "$SEED"); fi
    echo "$RECIPE: $batch" >&2
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        trap '' USR1 # SLURM's warning may reach the launcher too; the program handles it
        exec "${command[@]}"
    fi
}

# Shared by all pre-training recipes; weight decay 0.05, 40 warm-up epochs, base learning rate 1.5e-4 (per 256 clips)
# and AdamW are the program's defaults.
pretrain() { launch run_mae_pretraining.py --opt_betas 0.9 0.95 "$@"; }

classify() { launch run_class_finetuning.py "$@" ${DATA_SET:+--data_set "$DATA_SET"}; }

# finetune FLAGS...: fine-tunes a classifier from MODEL and tests it. The settings that all recipes share are the
# program's defaults: AdamW with betas 0.9 and 0.999, weight decay 0.05, layer decay 0.75, drop path 0.1, 5 warm-up
# epochs, RandAugment, random erasing, Mixup and CutMix, label smoothing 0.1, and the data set's views. As published,
# the last epoch's weights are tested: test.csv is commonly a copy of val.csv, which must not choose the epoch.
finetune() {
    local start=""
    if [[ ${MODEL:=$(own_pretraining)} != scratch ]]; then
        need_model "the pre-trained checkpoint to start from, or 'scratch'"
        start=$MODEL
    fi
    classify --finetune "$start" --test_last "$@"
}

# probe FLAGS...: trains a head on the frozen encoder of MODEL, without mixing clips or labels.
probe() {
    need_model "the pre-trained checkpoint to probe"
    local unmixed=(--num_sample 1 --mixup 0 --cutmix 0 --smoothing 0 --drop_path 0)
    classify --finetune "$MODEL" "${unmixed[@]}" "$@"
}

# evaluate FLAGS...: tests MODEL.
evaluate() {
    need_model "the fine-tuned checkpoint to test"
    classify --eval --finetune "$MODEL" "$@"
}

# A job that waits for another (slurm.sh --dependency) may name a checkpoint that does not exist yet.
need_model() {
    [[ -n ${MODEL:-} ]] || fail "MODEL is not set: $1"
    [[ -e $MODEL || $MODEL == timm:* || -n ${MODEL_MAY_COME:-} ]] || is_repository "$MODEL" ||
        fail "MODEL=$MODEL does not exist: $1"
}

# org/name on the Hugging Face hub
is_repository() {
    [[ $1 =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] &&
        [[ ! $1 =~ \.(pth|pt|pyth|bin|ckpt|safetensors)$ ]]
}

# The last checkpoint in the default folder of the pre-training recipe of a recipe finetune_<name>_<epochs>e.sh.
own_pretraining() {
    local name=${RECIPE#*/finetune_}
    name=${name%_*}
    local epochs=${name##*_}
    if [[ $epochs =~ ^([0-9]+)e$ ]]; then
        name=pretrain_$name${DATA_SET:+-$DATA_SET}
        echo "$ROOT/output/${RECIPE%/*}/$name/checkpoint-$((BASH_REMATCH[1] - 1)).pth"
    fi
}
