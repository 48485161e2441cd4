"""What surrounds training: checkpoints, the log, ranks, and files that appear whole or not at all."""
