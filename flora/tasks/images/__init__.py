"""Images: a dataset in memory, decoding, parquet folders, augmentation, and the task that classifies them."""
