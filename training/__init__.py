"""What a training run is: its state, how it is built, its loop, checkpoints, output folder and exit statuses."""
