"""Data sets of detection: images with boxes and masks, in the layouts that they come in."""
