"""What the architectures share: options, code and the training step."""
