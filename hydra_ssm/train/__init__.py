"""Training: data, transformers' Trainer, checkpoints that are whole, reports, and the commands."""

import hydra_ssm.text  # noqa: F401 - the models are registered, and transformers imported without its packages' reports
