"""Object detection and instance segmentation: annotated images, their readers, COCO's metrics."""
