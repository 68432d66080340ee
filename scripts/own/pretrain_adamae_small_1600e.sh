#!/usr/bin/env bash
# AdaMAE, ViT-S, your own videos on one GPU of 24 GB, adaptive masking at 0.95, 1600 epochs.
# 1 GPU x 96 x 2 accumulated = 192 clips a step; the rest as pretrain_adamae_base_1600e.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-192}
BATCH_SIZE=${BATCH_SIZE:-96}

pretrain --model pretrain_videomae_small_patch16_224 --decoder_depth 4 \
    --mask_type adaptive --mask_ratio 0.95 --sampling_rate 4 --epochs 1600 \
    --lr 3e-4 --save_ckpt_freq 100 --keep_ckpts 2 \
    "$@"
