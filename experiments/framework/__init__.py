"""What every experiment is run, kept, judged and shown by."""
