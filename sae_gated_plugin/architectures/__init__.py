"""One file per architecture: mathematics, config, training class, inference class."""
