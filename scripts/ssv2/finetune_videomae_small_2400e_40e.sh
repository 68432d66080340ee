#!/usr/bin/env bash
# VideoMAE, ViT-S, Something-Something V2: 40 epochs from the checkpoint of pretrain_videomae_small_2400e.sh.
# 32 GPUs x 12 = 384 videos a step.
# 2 augmented copies of each video, so 24 clips per GPU; the learning rate scales with videos.
# To reproduce: 66.8 / 90.3 top-1 / top-5, 2 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=384
BATCH_SIZE=${BATCH_SIZE:-12}

finetune --model vit_small_patch16_224 --data_set SSV2 --epochs 40 --lr 1e-3 --num_sample 2 \
    --layer_decay 0.7 \
    "$@"
