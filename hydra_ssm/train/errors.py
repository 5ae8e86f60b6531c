"""How a run ends before its end, and how that is told."""


def in_a_line(error: BaseException) -> str:
    """What an error of a library says, shortened: its message may be pages, or nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class UserError(ValueError):
    """A mistake that the user can repair: one line that says what must hold and what was given."""


class Diverged(UserError):
    """Training whose loss, gradients or weights are no longer finite."""

    def __init__(self, step: int, reason: str, learning_rate: float) -> None:
        super().__init__(
            f"the training has diverged by step {step}, {reason}: start again with --overwrite and a --learning-rate "
            f"below {learning_rate:g}"
        )
        self.step, self.reason = step, reason


class Interrupted(Exception):
    """A signal stopped many runs; what they had is kept."""

    def __init__(self, number: int, out: object) -> None:
        super().__init__(f"stopped and saved in {out}; the same command goes on")
        self.exit_code = 128 + number


class Stopped(Exception):
    """A signal stopped the run after a step, whose checkpoint was saved."""

    def __init__(self, step: int, steps: int, signal: int, out: object) -> None:
        super().__init__(f"stopped and saved after step {step} of {steps}; go on with --out {out} --resume")
        self.exit_code = 128 + signal
