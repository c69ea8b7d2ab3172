"""Random numbers of our kernels: four of each call of Philox, which gives as many for the price of one."""

import triton
import triton.language as tl


@triton.jit
def uniforms(seed, offset):
    """Give numbers in [0, 1) for `offset` [..., n], which numbers groups of four columns: [..., n, 2, 2]."""
    first, second, third, fourth = tl.rand4x(tl.load(seed), offset)
    return tl.join(tl.join(first, second), tl.join(third, fourth))
