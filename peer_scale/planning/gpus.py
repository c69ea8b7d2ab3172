"""GPUs that plans know by name: what their data sheets promise, and what of it kernels were seen to get.

Bandwidths and memory are those of the vendors' data sheets, dense figures; peaks are in `peer_scale.flops`. The network
is that of the vendors' reference systems, one port per GPU. Nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEMORY_SHARE: Final = 0.85
"""Of the data sheet's memory bandwidth that kernels which read and write whole tensors get: copies of gigabytes get
0.9, tensors of tens of megabytes less."""

LINK_SHARE: Final = 0.8
"""Of a link's bandwidth that collectives get: NCCL's protocols take a fifth (NVIDIA/nccl-tests issue 212)."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        device_name: what `torch.cuda.get_device_name()` calls it, by which `peak_flops` knows its peak.
        memory: GiB.
        memory_bandwidth: bytes/s.
        link: bytes/s of all NVLinks (L40S: of PCIe) in one direction.
        network: bytes/s to other nodes in one direction.
        products: share of the bf16 peak that large matrix products get: "Maximum Achievable Matmul FLOPS" of the
            repository stas00/ml-engineering (A100 268 of 312, H100 and H200 794.5 of 989, B200 1745 of 2250 TFLOP/s).
        attention: share of the bf16 peak that FlashAttention-2 gets on long sequences with heads of 64, forward and
            backward together, by its repository's figures (A100 176, H100 296 TFLOP/s).
    """

    device_name: str
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    products: float
    attention: float


GPUS: Final[dict[str, Gpu]] = {
    "A100": Gpu("A100", 80, 2.039e12, 300e9, 25e9, products=0.86, attention=0.56),
    "A100-40GB": Gpu("A100", 40, 1.555e12, 300e9, 25e9, products=0.86, attention=0.56),
    "H100": Gpu("H100 80GB HBM3", 80, 3.35e12, 450e9, 50e9, products=0.80, attention=0.30),
    "H200": Gpu("H200", 139, 4.8e12, 450e9, 50e9, products=0.80, attention=0.30),
    # no published figures of FlashAttention-2: as on an H100
    "B200": Gpu("B200", 178, 8e12, 900e9, 50e9, products=0.77, attention=0.30),
    # no published figures of either: as on an A100, whose kernels it runs
    "L40S": Gpu("L40S", 44, 0.864e12, 32e9, 25e9, products=0.86, attention=0.56),
}
