#!/usr/bin/env bash
# VideoMAE, ViT-L, Kinetics-400, tube masking at 0.9, 1600 epochs.
# 64 GPUs x 8 = 512 clips a step.
# To reproduce: 85.2 / 96.8 top-1 / top-5 after fine-tuning, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=512
BATCH_SIZE=${BATCH_SIZE:-8}

pretrain --model pretrain_videomae_large_patch16_224 --decoder_depth 12 \
    --mask_type tube --mask_ratio 0.9 --sampling_rate 4 --epochs 1600 \
    "$@"
