"""Measurements that are no claim of a text: one file each, with a `run` of its own."""
