"""Ranks: who they are, how they are arranged, and what they share when a tensor is split."""
