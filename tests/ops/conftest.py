"""Interpreted kernels may touch the memory of their arguments alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def kernels_stay_within_their_arguments() -> Iterator[None]:
    """Have the interpreter check every address. On a GPU a read past the end is seldom noticed, and may be fatal."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        bounds: list[tuple[int, int]] = []
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

        def taken(self: Any, args: Any, kwargs: Any, of: Callable[..., Any] = executor._init_args_hst) -> Any:
            found = of(self, args, kwargs)
            bounds[:] = [b for value in (*found[0], *found[1].values()) for b in _bounds(value)]
            return found

        def checked(name: str, mask_at: int) -> Callable[..., Any]:
            access = getattr(builder, name)

            def call(self: Any, *args: Any) -> Any:
                size = args[0].get_element_ty().primitive_bitwidth // 8
                _check(args[0].data, args[mask_at].data, size, bounds)
                return access(self, *args)

            return call

        patch.setattr(executor, "_init_args_hst", taken)
        patch.setattr(builder, "create_masked_load", checked("create_masked_load", 1))
        patch.setattr(builder, "create_masked_store", checked("create_masked_store", 2))
        yield


def _bounds(value: Any) -> Iterator[tuple[int, int]]:
    """The first byte of each tensor's memory, and the one after its last."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(value, tuple):
        for part in value:
            yield from _bounds(part)


def _check(addresses: np.ndarray, mask: np.ndarray, size: int, bounds: list[tuple[int, int]]) -> None:
    touched = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
        np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape)).astype(bool)
    ].astype(np.int64)
    if touched.size == 0:
        return
    low, high = int(touched.min()), int(touched.max()) + size
    if not any(first <= low and high <= last for first, last in bounds):
        raise IndexError(f"a kernel touches bytes {low} to {high}, its arguments are {bounds}")
