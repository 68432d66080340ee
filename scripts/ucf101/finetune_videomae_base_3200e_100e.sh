#!/usr/bin/env bash
# VideoMAE, ViT-B, UCF101: 100 epochs from the checkpoint of pretrain_videomae_base_3200e.sh.
# 8 GPUs x 16 = 128 videos a step.
# 2 augmented copies of each video, so 32 clips per GPU; the learning rate scales with videos.
# To reproduce: 91.3 / 98.5 top-1 / top-5, 5 x 3 views (VideoMAE model zoo).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=128
BATCH_SIZE=${BATCH_SIZE:-16}

finetune --model vit_base_patch16_224 --data_set UCF101 --epochs 100 --lr 5e-4 --num_sample 2 \
    --layer_decay 0.7 --drop_path 0.2 --fc_drop_rate 0.5 --min_lr 1e-5 --use_checkpoint \
    "$@"
