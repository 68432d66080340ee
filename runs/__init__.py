"""What keeps a training run alive: checkpoints, resuming, signals, watchdog, logs, bad steps and videos, flags."""
