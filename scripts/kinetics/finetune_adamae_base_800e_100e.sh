#!/usr/bin/env bash
# AdaMAE, ViT-B, Kinetics-400: 100 epochs from the checkpoint of pretrain_adamae_base_800e.sh.
# 64 GPUs x 8 = 512 videos a step.
# To reproduce: 81.7 / 95.2 top-1 / top-5, 5 x 3 views (AdaMAE paper, arXiv 2211.09120, abstract; top-5: a public
# leaderboard).
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=512
BATCH_SIZE=${BATCH_SIZE:-8}

finetune --model vit_base_patch16_224 --data_set Kinetics-400 --epochs 100 --lr 1e-3 --num_sample 1 \
    --view_fusion logits \
    "$@"
