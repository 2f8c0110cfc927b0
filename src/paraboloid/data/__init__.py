"""What a batch is, and how batches are taken from data sets and joined; imports from `passes`."""
