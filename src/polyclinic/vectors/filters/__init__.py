"""Filters, one file each: what changes a vector by itself before a rule merges it."""
