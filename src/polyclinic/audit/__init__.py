"""Attacks on what a study sends, run against its own data by its own owners."""
