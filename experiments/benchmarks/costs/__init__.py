"""What `experiments overhead` measures beside Flax: programs being made, calls of one layer, imports."""
