"""What makes FLoRA fast and changes no result: weights built for many layers together. May be absent."""
