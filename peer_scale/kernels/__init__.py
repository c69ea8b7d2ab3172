"""Fused operations: Triton for GPUs, with twins for the CPU that compute the same."""
