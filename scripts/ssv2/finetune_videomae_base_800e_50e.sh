#!/usr/bin/env bash
# VideoMAE, ViT-B, Something-Something V2: 50 epochs from the checkpoint of pretrain_videomae_base_800e.sh.
# 64 GPUs x 8 = 512 videos a step.
# To reproduce: 69.6 / 92.0 top-1 / top-5, 2 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=512
BATCH_SIZE=${BATCH_SIZE:-8}

finetune --model vit_base_patch16_224 --data_set SSV2 --epochs 50 --lr 5e-4 --num_sample 1 \
    "$@"
