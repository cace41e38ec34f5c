"""One file for each question about batch norm; experiments/study.py says what such a file has."""
