"""Questions about images: instruction tuning on conversations."""
