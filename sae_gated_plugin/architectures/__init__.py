"""Gated, ProLU and their relatives: one file each, on a common base."""
