"""What a user did wrong, in one line."""


class UserError(Exception):
    """A mistake that the user can repair: its message says what must hold and what was given."""


class Stopped(Exception):
    """A signal stopped the run after a step, whose checkpoint was saved."""

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}, saved after step {step}")
        self.step, self.signal = step, signal
