"""One file for each question about batch norm; experiments/framework/study.py says what such a file has."""
