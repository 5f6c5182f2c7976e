"""What one network can learn from another of another architecture: soft targets, aligned features, dual weights."""
