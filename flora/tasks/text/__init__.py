"""Texts: tokens in memory, rows of parquet files, and what tasks of classifiers and language models share."""
