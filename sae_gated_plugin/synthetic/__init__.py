"""SAEs on data of known features."""
