#!/usr/bin/env bash
# AdaMAE, ViT-B, Something-Something V2: 50 epochs from the checkpoint of pretrain_adamae_base_800e.sh.
# 64 GPUs x 8 = 512 videos a step.
# To reproduce: 70.04 / 92.70 top-1 / top-5, 2 x 3 views (AdaMAE paper, arXiv 2211.09120, ablation tables).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=512
BATCH_SIZE=${BATCH_SIZE:-8}

finetune --model vit_base_patch16_224 --data_set SSV2 --epochs 50 --lr 5e-4 --num_sample 1 \
    --view_fusion logits \
    "$@"
