#!/usr/bin/env bash
# Tests a fine-tuned ViT-B on Kinetics-400, 5 x 3 views.
# For another size append e.g. --model vit_large_patch16_224.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=
BATCH_SIZE=${BATCH_SIZE:-16}

evaluate --model vit_base_patch16_224 --data_set Kinetics-400 \
    "$@"
