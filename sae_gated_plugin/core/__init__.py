"""The sparse core: finding the active latents, the products on them, and their gradients."""
