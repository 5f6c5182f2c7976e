"""The data room: tables of images, readers, splits, partitions, and the arrays that training sees."""

from polyclinic.data.manifest import Case, class_notes, collect, read_manifest, read_table, write_manifest
from polyclinic.data.partition import partition_cases
from polyclinic.data.split import check_split, split_cases, write_splits

__all__ = [
    "Case",
    "check_split",
    "class_notes",
    "collect",
    "partition_cases",
    "read_manifest",
    "read_table",
    "split_cases",
    "write_manifest",
    "write_splits",
]
