"""One SAE over many processes: its latents divided among them, the rest alike in each."""
