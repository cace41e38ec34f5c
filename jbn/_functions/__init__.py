"""What users call, by subject; `jbn` hands it out."""
