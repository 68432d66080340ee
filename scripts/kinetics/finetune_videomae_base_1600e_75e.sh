#!/usr/bin/env bash
# VideoMAE, ViT-B, Kinetics-400: 75 epochs from the checkpoint of pretrain_videomae_base_1600e.sh.
# 64 GPUs x 6 = 384 videos a step.
# 2 augmented copies of each video, so 12 clips per GPU; the learning rate scales with videos.
# To reproduce: 81.5 / 95.1 top-1 / top-5, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=384
BATCH_SIZE=${BATCH_SIZE:-6}

finetune --model vit_base_patch16_224 --data_set Kinetics-400 --epochs 75 --lr 5e-4 --num_sample 2 \
    "$@"
