#!/usr/bin/env bash
# VideoMAE, ViT-H, Kinetics-400: 50 epochs from the checkpoint of pretrain_videomae_huge_1600e.sh.
# 64 GPUs x 8 = 512 videos a step.
# 2 augmented copies of each video, so 16 clips per GPU; the learning rate scales with videos.
# To reproduce: 86.6 / 97.1 top-1 / top-5, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=512
BATCH_SIZE=${BATCH_SIZE:-8}

finetune --model vit_huge_patch16_224 --data_set Kinetics-400 --epochs 50 --lr 1e-3 --num_sample 2 \
    --drop_path 0.2 --fc_drop_rate 0.5 --min_lr 1e-5 --use_checkpoint \
    "$@"
