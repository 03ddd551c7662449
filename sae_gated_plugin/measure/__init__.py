"""Measuring a trained SAE on held-out text."""
