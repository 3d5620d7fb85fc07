"""What a teleport and a rotated step cost on many GPUs, on paper: counts from shapes, rates from public figures."""
