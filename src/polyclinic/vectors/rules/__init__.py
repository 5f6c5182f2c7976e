"""Merge rules, one file each: how the vectors of several sites become one."""
