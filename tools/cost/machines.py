"""What GPUs can do: one table, every constant with its source."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates in bytes or multiply-adds per microsecond unless said otherwise; times in microseconds."""

    name: str
    chip: str  # of triton_resources.CHIPS
    sms: int  # multiprocessors, compute units
    clock: float  # MHz while it works
    registers: int  # per multiprocessor, 32 bits
    shared: int  # bytes per multiprocessor
    threads: int  # per multiprocessor
    hbm: float  # MB/us = TB/s that a sum over 1 GiB reads; the roofline's denominator
    l2: float  # TB/s from the L2 to all multiprocessors
    dram_us: float  # latency without load
    l2_us: float
    products: float  # multiply-adds of 16-bit numbers per cycle and multiprocessor, wide instructions
    narrow: float  # part of it that mma.sync reaches
    gemm: float  # TFLOP/s of a large GEMM; the roofline's other denominator
    fp64: float  # cycles for which an instruction in double takes its scheduler
    barrier: float  # cycles of a thread block's barrier beside the skew that the code itself makes
    launch: float  # from the end of a kernel to the start of its successor's work, in a graph
    early: float  # the same with programmatic dependent launch
    sources: str
    fetch: float = 500.0  # instructions that did not run lately; fitted to H100 and H200 (bench/NOTES.md), else assumed
    handover: float = (
        2.4  # from a thread block's last product until others go on with it; H200 (bench/NOTES.md), else assumed
    )


KIB = 1 << 10
HOPPER = dict(chip="sm_90", sms=132, clock=1755, registers=1 << 16, shared=228 * KIB, threads=2048, l2_us=0.16,
              products=2048, narrow=0.62, gemm=800, fp64=2, barrier=30, launch=1.3, early=0.9)  # fmt: skip
HOPPER_SOURCES = (
    "132 multiprocessors, 228 KB, 64 lanes of FP64: NVIDIA H100 datasheet and CUDA C++ Programming Guide; 989 TFLOP/s at "
    "1.83 GHz = 2048 products per cycle; mma.sync at .62 of that: arXiv:2402.13499; latencies, 281 and 690 cycles on a "
    "GH200: github.com/markdewing/AI_kernels latency/; L2 5.5 to 6 TB/s: chipsandcheese.com on the H100 PCIe; 1.3 us per "
    "launch in a graph: hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles; assumed: clock under load, 800 TFLOP/s by "
    "cuBLAS, barrier, early launch. "
)
MACHINES = {
    m.name: m
    for m in (
        Machine("H100", hbm=3.0, l2=5.5, dram_us=0.39, **HOPPER,
                sources=HOPPER_SOURCES + "HBM 3.35 TB/s (datasheet), .90 of it assumed."),
        Machine("H200", hbm=4.3, l2=5.5, dram_us=0.39, **HOPPER,
                sources=HOPPER_SOURCES + "HBM 4.8 TB/s (datasheet), .90 of it assumed."),
        Machine("A100", "sm_80", 108, 1410, 1 << 16, 164 * KIB, 2048, 1.8, 4.0, 0.40, 0.15, 1024, 1.0, 260, 4, 30, 1.6,
                1.6, "108 multiprocessors, 164 KB, 2.04 TB/s (80 GB), 312 TFLOP/s = 1024 products per cycle, 32 lanes of "
                "FP64: NVIDIA A100 datasheet and whitepaper; L2 200 cycles: arXiv:2208.11174; assumed: .88 of the HBM's "
                "rate, 4 TB/s of the L2's 7.05, DRAM 560 cycles, launches, 260 TFLOP/s by cuBLAS."),
        Machine("B200", "sm_100", 148, 1850, 1 << 16, 228 * KIB, 2048, 7.0, 9.0, 0.47, 0.16, 4096, 0.25, 1700, 2, 30, 1.3,
                0.9, "148 multiprocessors, 8 TB/s: NVIDIA datasheet; latencies, 295 and 860 cycles: "
                "github.com/markdewing/AI_kernels latency/; 2.25 PFLOP/s by tcgen05 = 4096 products per cycle; assumed: "
                "mma.sync at 1024 products, .88 of the HBM's rate, L2 by H100's per multiprocessor with a better fabric, "
                "launches, 1700 TFLOP/s by cuBLAS."),
        Machine("MI300X", "gfx942", 304, 2100, 1 << 17, 64 * KIB, 2048, 4.2, 10.0, 0.80, 0.24, 1024, 1.0, 650, 4, 40, 4.0,
                4.0, "304 compute units, 64 KB, 512 registers of 64 lanes on each of 4 SIMDs, 5.3 TB/s, 1307 TFLOP/s = 1024 "
                "products per cycle: AMD CDNA 3 whitepaper; what is shared by the dies comes from the Infinity Cache, "
                "11.9 of 17.2 TB/s measured by chipsandcheese.com/p/testing-amds-giant-mi300x; assumed: .80 of the HBM's "
                "rate, latencies, launches in a graph, 650 TFLOP/s by hipBLASLt."),
    )
}  # fmt: skip
# Assumed, the same for all: how sharply the slowest of several resources decides (the power of a mean; two equal ones take
# 1.19 of one); what a thread block that finds nothing to do takes.
SHARPNESS = 4.0
EMPTY_BLOCK_US = 0.3


def of(device_name: str) -> Machine:
    """By the name that a driver gives. ValueError: not in the table."""
    found = next((machine for name, machine in MACHINES.items() if name in device_name), None)
    if found is None:
        raise ValueError(f"{device_name} is not in the table of machines")
    return found
