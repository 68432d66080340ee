#!/usr/bin/env bash
# Attentive probe of a ViT-B on Something-Something V2: the head and schedule of V-JEPA's frozen evaluation (Bardes et
# al., 2024), on one clip per video instead of two.
# 64 GPUs x 4 = 256 videos a step.
# To reproduce: no number is published for this protocol.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-256}
BATCH_SIZE=${BATCH_SIZE:-4}

probe --attentive_probe --model vit_base_patch16_224 --data_set SSV2 --epochs 20 --warmup_epochs 0 \
    --lr 1e-3 --min_lr 0 --weight_decay 0.01 \
    "$@"
