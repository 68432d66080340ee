#!/usr/bin/env bash
# Tests a fine-tuned classifier on Kinetics-400, 5 x 3 views.
# The model and its clips are read from the checkpoint; flags override them.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=
BATCH_SIZE=${BATCH_SIZE:-16}

evaluate --data_set Kinetics-400 \
    "$@"
