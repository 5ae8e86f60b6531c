"""Checkpoints of transformers' Trainer that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from .checkpoints import remove_old, whole_folder


class WholeCheckpoints(Trainer):
    """Writes each checkpoint beside its place, hashed, and keeps the newest ones."""

    _writing_to: Path | None = None

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with whole_folder(self.folder / name) as part:
            self._writing_to = part
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            for file in (part / name).iterdir():
                file.rename(part / file.name)
            (part / name).rmdir()
        remove_old(self.folder)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)
