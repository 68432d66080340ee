#!/usr/bin/env bash
# MAE-ST, ViT-L, Kinetics-400, agnostic masking at 0.9, 100 epochs of 4 clips a video.
# 128 GPUs x 2 = 256 videos a step.
# To reproduce: 84.35 top-1 after fine-tuning, by the validation of the fine-tuning program (MAE-ST repository).
# The published command does not say on how many GPUs; with 128 the peak rate is the paper's 1.6e-3.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-256}
BATCH_SIZE=${BATCH_SIZE:-2}

pretrain --model pretrain_mae_st_large_patch16_224 --decoder_depth 4 \
    --mask_type agnostic --mask_ratio 0.9 --sampling_rate 4 --num_sample 4 --epochs 100 --warmup_epochs 5 \
    --lr 1.6e-3 --min_lr 0 --clip_grad 0.02 --amp off \
    "$@"
