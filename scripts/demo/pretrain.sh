#!/usr/bin/env bash
# Pre-training in the small world of the demo (tools/reproduce.py --scale demo): 1500 steps of 16 clips of 32 x 32 pixels,
# with the model and rates of scripts/demo.sh and the published decoder depth. 3 minutes on one core.
# No number is published for it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-8}
BATCH_SIZE=${BATCH_SIZE:-$TOTAL_BATCH}

pretrain --model pretrain_videomae_tiny_patch8_64 --decoder_depth 4 --input_size 32 --pos_embed sinusoid_3d \
    --sampling_rate 1 --num_sample 2 --epochs 6 --warmup_epochs 1 --warmup_steps 160 --lr 0.032 --min_lr 0.0016 \
    --amp off --device auto --num_workers 1 --vis_freq 0 --log_freq 50 --save_ckpt_freq 1 --keep_ckpts 1 \
    "$@"
