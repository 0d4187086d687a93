"""Detection data sets: images with boxes and masks, in several formats."""
