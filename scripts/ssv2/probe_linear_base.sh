#!/usr/bin/env bash
# Linear probe of a ViT-B on Something-Something V2: MAE's protocol (He et al., 2022, appendix A.1), with 1024 videos a
# step instead of 16384 images.
# 8 GPUs x 128 = 1024 videos a step.
# To reproduce: no number is published for this protocol.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-1024}
BATCH_SIZE=${BATCH_SIZE:-128}

probe --linear_probe --probe_batch_norm --model vit_base_patch16_224 --data_set SSV2 --epochs 90 --warmup_epochs 10 \
    --opt lars --lr 0.1 --min_lr 0 --weight_decay 0 --aa none --color_jitter 0 --reprob 0 \
    "$@"
