"""Reading SAEs back: ours, SAELens's and those of other libraries."""
