"""The networks of a run, and the normalization layers in them."""
