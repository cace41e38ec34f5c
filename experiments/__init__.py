"""One question per file; `python -m experiments list` shows them. Run from the checkout, never installed."""
