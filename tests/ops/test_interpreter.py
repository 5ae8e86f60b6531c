"""The check of addresses that `conftest.py` adds to the interpreter."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _copy(x, y, reads, writes, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, mask=i < reads, other=0.0), mask=i < writes)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
@pytest.mark.parametrize(("reads", "writes"), [(8, 8), (9, 8), (8, 9)])
def test_a_kernel_that_leaves_its_arguments_is_found(reads, writes):
    x, y = torch.ones(8), torch.zeros(8)
    if reads == writes == 8:
        _copy[(1,)](x, y, reads, writes, 16)
        assert torch.equal(x, y)
    else:
        with pytest.raises(Exception, match="a kernel touches bytes"):
            _copy[(1,)](x, y, reads, writes, 16)
