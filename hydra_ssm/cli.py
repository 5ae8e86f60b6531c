"""The command line: how a command begins and ends. What the commands are stands in commands/."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib.metadata import version
from itertools import dropwhile, takewhile
from typing import Any

from . import __version__
from ._extras import require

MISTAKE = 2  # the exit code of what the user can repair
HELP = """Bidirectional state space encoders for text and pictures.

usage: hydra-ssm COMMAND ..., and hydra-ssm COMMAND --help for its options; hydra-ssm --version

  pretrain     train a masked language model on text
  data prepare turn text of any size into shards of tokens for pretrain
  fill-mask    show the likeliest words for each [MASK] of a text
  embed        write a vector for each paragraph of a file
  export       write a model as an ONNX or torch.export file that runs without this library
  inspect      draw the matrices that a model mixes a sentence or a picture with
  convert      turn a released checkpoint into a folder that transformers loads
  bench        time a layer on this machine, beside attention
  ablate       compare the matrix classes: train a model of each, alike in all else
  compare      compare Hydra with BERT: the same tokens, the same seconds, GLUE, longer rows
  glue         fine-tune a model on GLUE's tasks, and show the paper's table
  finetune     fine-tune a model on your own table: classes, pairs, numbers or tags
  image train, eval, predict, compare
               train an image classifier, by the paper's recipe on timm's parts; measure one; name pictures and draw
               them; compare ViT, Hydra-ViT and its rivals, alike in all else

examples:

  hydra-ssm pretrain                                    a small model on a text that Python carries: 3 minutes
  hydra-ssm pretrain notes/ book.txt --out runs/mine    on your own files and folders
  hydra-ssm data prepare books/ --out shards            text of any size, tokenised and packed once and for all
  hydra-ssm fill-mask runs/mine "A [MASK] sentence."    what it learned
  hydra-ssm embed runs/mine notes/today.md              a vector for each paragraph
  hydra-ssm inspect runs/mine "A sentence."             which tokens each token reads: a picture and a page
  hydra-ssm bench --plot speed.png                      checked, then timed: a table and a picture
  hydra-ssm ablate --small                              which matrices learn best: a table and a picture
  hydra-ssm image train                                 an image classifier on bundled digits: a minute or two

HYDRA_SSM_TRACEBACK=1 shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. A user's mistake is one line on stderr and code 2."""
    if argv is None and sys.argv[1:2] in (["pretrain"], ["inspect"], ["bench"], ["finetune"], ["image"]):
        _let_waiting_threads_sleep()
    given = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that is no UTF-8 is no reason to end
    try:
        if not given or given[0] in ("-h", "--help"):
            print(HELP, end="")
            return 0
        if given[0] == "--version":
            print(f"hydra-ssm {__version__}, torch {version('torch')}")
            return 0
        command = _parse(given)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command()
    except BrokenPipeError:  # as when `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except BaseException as error:
        code = exit_code(error)
        if code is None or os.environ.get("HYDRA_SSM_TRACEBACK"):
            raise
        _say("error", one_line(error))
        return code
    return 0


def _let_waiting_threads_sleep() -> None:
    """Start this process again with an environment that OpenMP reads only while torch is loaded.

    Threads that spin while they wait keep others from work as soon as there are more of them than idle cores: beside
    other programs, training on two cores took 5 to 20 times as long.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parse(given: Sequence[str]) -> Callable[[], None]:
    """The command, ready to run. tyro explains a mistake in a box of several lines; one line says the same."""
    tyro = require("tyro", "train")
    from .commands import COMMANDS

    words = 2 if " ".join(given[:2]) in COMMANDS else 1
    name, rest = " ".join(given[:words]), given[words:]
    command = COMMANDS.get(name)
    if command is None:
        group = {c: f for c, f in COMMANDS.items() if c.startswith(f"{name} ")}
        if group and rest[:1] in (["-h"], ["--help"]):
            return partial(print, _help_of(name, group), end="")
        raise ValueError(f"the command must be one of {', '.join(group or COMMANDS)}, got {name}")

    @wraps(command)
    def ready(*arguments: Any, **options: Any) -> Callable[[], None]:
        return partial(command, *arguments, **options)

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(ready, prog=f"hydra-ssm {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise ValueError(_first_part(box.getvalue())) from None


def _help_of(name: str, group: Mapping[str, Callable[..., None]]) -> str:
    """The commands that begin with a word, each with what its own help begins with."""
    wide = max(map(len, group))
    lines = [f"  {c:{wide}} {(f.__doc__ or '').partition(chr(10))[0]}" for c, f in group.items()]
    return "\n".join([f"usage: hydra-ssm {name} COMMAND ..., and --help after it for its options", "", *lines, ""])


def _first_part(box: str) -> str:
    """What a box says below its title and above its next rule, drawn with lines or, without UTF-8, with hyphens."""
    body = dropwhile(_is_rule, [line.strip("│ ") for line in box.splitlines()[1:]])
    said = " ".join(takewhile(lambda line: not _is_rule(line), body)).partition(" Got errors:")[0]
    return re.sub(r"\{None\}\||'None', |, 'None'", "", said)  # which nobody has to say


def _is_rule(line: str) -> bool:
    return not line.strip("╰╯─- ")


def exit_code(error: BaseException) -> int | None:
    """2 for what the user can repair, 128 and the signal for what a signal stopped, None for a mistake of ours."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, ImportError):
        return MISTAKE if "hydra-ssm[" in str(error) else None
    return getattr(error, "exit_code", MISTAKE if isinstance(error, ValueError | OSError) else None)


def one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say("warning", " ".join(str(message).split()))


def _say(kind: str, text: str) -> None:
    print(f"hydra-ssm: {kind}: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
