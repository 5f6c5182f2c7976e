"""Data vectors: hospitals that are never online together contribute to one model, each with one signed file."""
