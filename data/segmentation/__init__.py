"""Images with a class for each pixel: formats, augmentation and batches."""
