#!/usr/bin/env bash
# AdaMAE, ViT-B, your own videos on one GPU of 24 GB, adaptive masking at 0.95, 1600 epochs.
# 1 GPU x 64 x 3 accumulated = 192 clips a step: the total batch and base rate of VideoMAE's UCF101, peak 2.25e-4.
# The warm-up is the program's default: 40 epochs, and 1/20 of a shorter run (--epochs).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-192}
BATCH_SIZE=${BATCH_SIZE:-64}

pretrain --model pretrain_videomae_base_patch16_224 --decoder_depth 4 \
    --mask_type adaptive --mask_ratio 0.95 --sampling_rate 4 --epochs 1600 \
    --lr 3e-4 --save_ckpt_freq 100 --keep_ckpts 2 \
    "$@"
