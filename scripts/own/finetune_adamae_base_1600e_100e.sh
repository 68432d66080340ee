#!/usr/bin/env bash
# ViT-B, your own classes on one GPU of 24 GB: 100 epochs from the checkpoint of pretrain_adamae_base_1600e.sh, or from
# a published one (MODEL). Pass --nb_classes if neither the lists nor labels.txt beside them has names.
# 1 GPU x 16 x 8 accumulated = 128 videos a step: the total batch and base rate of VideoMAE's UCF101, peak 2.5e-4.
# 2 augmented copies of each video, so 32 clips at once. The best epoch in validation is tested, on videos of its own.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-128}
BATCH_SIZE=${BATCH_SIZE:-16}

finetune --model vit_base_patch16_224 --data_set custom --epochs 100 --lr 5e-4 --num_sample 2 \
    --layer_decay 0.7 --drop_path 0.2 --fc_drop_rate 0.5 --min_lr 1e-5 --test_last false \
    "$@"
