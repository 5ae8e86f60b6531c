"""Imports of packages that only an extra installs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Literal

Extra = Literal["text", "train", "vision", "export"]


def require(name: str, extra: Extra) -> ModuleType:
    """Import the module ``name``, which ``pip install "hydra-ssm[extra]"`` provides.

    Raises:
        ImportError: the package is not installed; the message names the extra. An installed package that fails to
            import, or lacks a dependency of its own, raises its own error. But a torchvision that is not the build for
            the installed torch is named: timm, and transformers where it finds one, import it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(f'{package} is not installed: pip install "hydra-ssm[{extra}]"', name=package) from None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        raise ImportError(
            f"torchvision {version('torchvision')}, which hydra-ssm[vision] brings, is not the build for torch "
            f"{version('torch')}: install both from one index, for a CPU https://download.pytorch.org/whl/cpu, "
            "or remove torchvision if you need no image models",
            name="torchvision",
        ) from error


@contextmanager
def imports_unannounced() -> Iterator[None]:
    """No log below errors meanwhile: packages that others import wherever they are found report what they lack."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
