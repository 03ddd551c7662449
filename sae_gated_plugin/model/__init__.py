"""The language model: its hook points, forward passes and text."""
