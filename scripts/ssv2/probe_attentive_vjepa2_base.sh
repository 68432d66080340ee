#!/usr/bin/env bash
# Attentive probes of a ViT-B on Something-Something V2: the head, schedule and settings of V-JEPA 2's frozen evaluation
# (Assran et al., 2025): four blocks with 16 heads, 5 rates x 4 weight decays at once, the best in validation.
# 64 GPUs x 4 = 256 videos a step.
# To reproduce: no number is published for this protocol.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-256}
BATCH_SIZE=${BATCH_SIZE:-4}

probe --attentive_probe --probe_blocks 4 --model vit_base_patch16_224 --data_set SSV2 --epochs 20 --warmup_epochs 0 \
    --probe_lrs 5e-3 3e-3 1e-3 3e-4 1e-4 --probe_weight_decays 0.01 0.1 0.4 0.8 --min_lr 0 \
    "$@"
