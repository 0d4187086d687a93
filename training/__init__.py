"""Training runs: state, construction, loop, checkpoints, output folder and exit statuses."""
