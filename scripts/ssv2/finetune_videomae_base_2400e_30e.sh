#!/usr/bin/env bash
# VideoMAE, ViT-B, Something-Something V2: 30 epochs from the checkpoint of pretrain_videomae_base_2400e.sh.
# 64 GPUs x 6 = 384 videos a step.
# 2 augmented copies of each video, so 12 clips per GPU; the learning rate scales with videos.
# To reproduce: 70.8 / 92.4 top-1 / top-5, 2 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=384
BATCH_SIZE=${BATCH_SIZE:-6}

finetune --model vit_base_patch16_224 --data_set SSV2 --epochs 30 --lr 5e-4 --num_sample 2 \
    "$@"
