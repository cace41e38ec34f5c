"""What the two Flax modules are made of, and what is done to whole Flax models."""
