"""Any folder of labelled images, decoded batch by batch."""
