#!/usr/bin/env bash
# VideoMAE, ViT-L, Kinetics-400: 35 epochs from the checkpoint of pretrain_videomae_large_1600e.sh.
# 64 GPUs x 2 = 128 videos a step.
# 2 augmented copies of each video, so 4 clips per GPU; the learning rate scales with videos.
# To reproduce: 85.2 / 96.8 top-1 / top-5, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=128
BATCH_SIZE=${BATCH_SIZE:-2}

finetune --model vit_large_patch16_224 --data_set Kinetics-400 --epochs 35 --lr 2e-3 --num_sample 2 \
    "$@"
