"""Photos, data sets and batches."""
