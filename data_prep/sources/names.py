"""What the name of an input file says: what it holds, and how it is compressed."""

import os
import posixpath

from xlstm_io.remote import is_remote

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
CODE_SUFFIXES = {
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".rs", ".go"),
    *(".java", ".kt", ".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".cs", ".fs", ".swift", ".m"),
    *(".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".f90", ".s"),
    *(".sh", ".sql", ".zig", ".dart", ".v", ".sv", ".vhd", ".asm", ".css", ".scss", ".lean"),
}
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", *CODE_SUFFIXES}
TABLE_SUFFIXES = {".parquet", ".arrow"}
COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
"""Suffix to the name of the format."""

REFUSED_SUFFIXES = {".csv": ",", ".tsv": "\\t"}
"""Tables of text and what separates their columns: a text editor cannot tell their records."""


def name_of(path: str) -> str:
    """A path, or the part of a URL that names the file."""
    return path.split("::")[0].split("?")[0] if is_remote(path) else path


def absolute(path: str) -> str:
    """The same file, whatever the working directory will be."""
    return path if is_remote(path) else os.path.abspath(path)


def suffixes(path: str) -> tuple[str, str]:
    """(content suffix, compression suffix or "") of a path or URL, lower case."""
    stem, suffix = posixpath.splitext(name_of(path).lower())
    if suffix in COMPRESSION_SUFFIXES:
        return posixpath.splitext(stem)[1], suffix
    return suffix, ""


def base_name(path: str) -> str:
    """Last part of a path or URL."""
    return posixpath.basename(name_of(path))
