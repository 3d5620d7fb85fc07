"""Teleportation in the training stacks people use; each module imports its stack, and says what to install without it."""
