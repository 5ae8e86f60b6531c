"""Training: data, the Trainer, checkpoints and reports."""
