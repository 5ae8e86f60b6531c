"""Training: data, transformers' Trainer, checkpoints that are whole, reports, and the commands."""
