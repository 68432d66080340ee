"""What keeps a run alive: engines, checkpoints, resuming, signals, watchdog, logs, bad steps and videos, flags."""
