"""What the documents hold: their commands, links, tables and prose."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
)
EXAMPLES = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").iterdir()))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(name, language):
    """Texts of the fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", read(name), flags=re.S)


def prose(name):
    """A document without its fenced blocks."""
    return re.sub(r"```.*?```", "", read(name), flags=re.S)


def shell_lines(name):
    """Commands of a document's sh blocks, one a line."""
    return [line.strip() for block in fenced(name, "sh") for line in block.splitlines() if line]


def commands(name):
    """Commands of the sh blocks, and those in inline code."""
    inline = re.findall(r"`([^`\n]+)`", prose(name))
    known = re.compile(r"(make [a-z]|python -m [a-z]|\.ci/run$)")
    return shell_lines(name) + [code for code in inline if known.match(code)]


def anchor_of(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(name):
    """Anchors of a document's headings."""
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", prose(name), flags=re.M)}


def cells(name):
    """(line number, cell) of every table in a document."""
    for number, line in enumerate(read(name).splitlines(), 1):
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", line)[1:-1]:
                yield number, cell.strip()


def sections(name):
    """(heading, text) of every part of a document under a `##`."""
    for part in re.split(r"^## ", read(name), flags=re.M)[1:]:
        heading, _, text = part.partition("\n")
        yield heading, text
