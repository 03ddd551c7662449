"""The core: encode and decode on the active latents only."""
