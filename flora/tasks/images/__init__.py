"""Images: a dataset in memory, decoding, parquet folders, augmentation, the task that classifies them, and digits."""
