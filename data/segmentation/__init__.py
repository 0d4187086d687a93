"""Images with a class for each pixel: where they are stored, how they are augmented, and their batches."""
