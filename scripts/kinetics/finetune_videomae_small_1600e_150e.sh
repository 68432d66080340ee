#!/usr/bin/env bash
# VideoMAE, ViT-S, Kinetics-400: 150 epochs from the checkpoint of pretrain_videomae_small_1600e.sh.
# 32 GPUs x 12 = 384 videos a step.
# 2 augmented copies of each video, so 24 clips per GPU; the learning rate scales with videos.
# To reproduce: 79.0 / 93.8 top-1 / top-5, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=384
BATCH_SIZE=${BATCH_SIZE:-12}

finetune --model vit_small_patch16_224 --data_set Kinetics-400 --epochs 150 --lr 5e-4 --num_sample 2 \
    "$@"
