#!/usr/bin/env bash
# Fine-tuning in the small world of the demo (tools/reproduce.py --scale demo): 250 steps of 16 clips of 32 x 32 pixels, as
# in scripts/demo.sh. Half a minute on one core.
# No number is published for it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=${TOTAL_BATCH:-16}
BATCH_SIZE=${BATCH_SIZE:-$TOTAL_BATCH}

finetune --model vit_tiny_patch8_64 --input_size 32 --data_set custom --nb_classes 10 --sampling_rate 1 --num_sample 1 \
    --epochs 2 --warmup_steps 40 --lr 0.048 --min_lr 0.00048 --layer_decay 0.5 --slot_pooling --init_scale 1 \
    --drop_path 0 --crop_scale 0.5 1 --flip false --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 \
    --smoothing 0 --short_side_size 36 --test_num_segment 1 --test_num_crop 3 \
    --amp off --device auto --num_workers 1 --log_freq 25 --save_ckpt_freq 1 --keep_ckpts 1 \
    "$@"
