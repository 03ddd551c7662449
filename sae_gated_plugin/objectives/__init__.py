"""What training minimises beside the reconstruction: sparsity losses, targets, dead latents."""
