"""`python -m sae_gated_plugin` is `sae-gated`."""

from .cli.commands import main

main()
