"""What the command line shows of a model: where it comes from, the table of its joints, and their picture."""
