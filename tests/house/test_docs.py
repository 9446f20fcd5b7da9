"""Documents: every link resolves, numbers and words keep to their rules."""

import ast
import re
import subprocess
from collections import Counter

import pytest

from pretrain.config.messages import _NAMED_ELSEWHERE
from pretrain.config.schema import FIELDS, SECTIONS
from slurm.batch_files.site import Site
from tests.house.documents import (
    DOCUMENTS,
    EXAMPLES,
    ROOT,
    anchor_of,
    anchors,
    cells,
    prose,
    read,
    sections,
)
from xlstm_io.errors import exit_code_table
from xlstm_mcore.old_keys import OLD_KEYS


def test_each_named_test_exists():
    named = set()
    for name in DOCUMENTS:
        named |= set(re.findall(r"`(tests/[\w./]+)::(\w+)`", read(name)))
        named |= set(re.findall(r'\]\(\.\./(tests/[\w./]+) "(\w+)"\)', read(name)))
    assert len(named) >= 50
    for path, test in sorted(named):
        assert f"def {test}(" in read(path), f"no {test} in {path}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!http)([^)\s]+)(?:\s[^)]*)?\)", prose(name)):
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{name}: {target}"
    rooms = "tests|slurm|pretrain|xlstm_mcore|xlstm_io|data_prep|constraints|kernels|benchmarks"
    rooms += "|examples"
    for path in re.findall(rf"`((?:{rooms}|docs)/[\w./]*)`", prose(name)):
        assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_name_files_that_exist(name):
    for path in re.findall(r"\b((?:examples|pretrain|docs)/[\w/]+\.(?:sh|py|yaml|md))", read(name)):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_every_page_is_in_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", read("README.md")))
    assert linked == {name for name in DOCUMENTS if name.startswith("docs/")}


def test_the_readme_fits_two_screens():
    assert len(read("README.md").splitlines()) <= 130


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if n != "docs/checkpoints.md"])
def test_no_cell_is_longer_than_a_line(name):
    """But for the table of faults, which names tests."""
    for number, cell in cells(name):
        assert len(cell) <= 100, f"{name}:{number}: {len(cell)} characters: {cell}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_row_has_as_many_cells_as_the_head_of_its_table(name):
    """Further ones are not shown."""
    widths = Counter(number for number, _ in cells(name))
    for number, width in widths.items():
        assert widths.get(number - 1, width) == width, f"{name}:{number}"


@pytest.mark.parametrize(("heading", "text"), list(sections("docs/benchmarks.md")))
def test_every_number_stands_beside_its_command(heading, text):
    without_code = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    if not re.search(r"\d", without_code):
        return
    assert "```sh\n" in text, f"{heading}: which command prints these numbers?"
    assert re.search(r"^(Machine: .*|Counted)\b", text, flags=re.M), f"{heading}: which machine?"
    if "No figure" not in text:
        assert re.search(r"Date: \d{4}-\d\d-\d\d\.", text), f"{heading}: when?"


MEASURED = re.compile(
    r"\b\d[\d.,]*\s?(?:%|(?:[KMGT]?FLOP/s|tokens/s|[MG]B/s|GB|ms|nats?|times (?:as|the|faster))\b)"
)


@pytest.mark.parametrize(
    "name", [n for n in DOCUMENTS if n not in ("docs/benchmarks.md", "docs/configuration.md")]
)
def test_measured_numbers_stand_in_benchmarks_alone(name):
    """Output in fenced blocks is an example, and the size of an installation is a requirement."""
    text = prose(name).replace("about 3 GB of disk", "").replace("0.3 nat below", "")
    found = MEASURED.search(text)
    assert found is None, f"{name}: {found.group()} belongs into docs/benchmarks.md"


BANNED = re.compile(
    r"(?<!there )\b(?:is|are) no (?!longer|more\b|other)|\btwins?\b|\brefusals?\b|\bledgers?\b"
    r"|\bfates?\b|\bcanonical tensors?\b|\brectangles?\b",
    flags=re.I,
)


ON_DISK = {"data_prep/build/stored_plan.py": '".fate"'}  # names of files never change


def plain_words(name):
    """Uses of words that docs/glossary.md replaces, as `file:line: word`."""
    for number, line in enumerate(read(name).splitlines(), 1):
        for found in BANNED.finditer(line.replace(ON_DISK.get(name, "\0"), "")):
            yield f"{name}:{number}: {found.group().strip()!r} in: {line.strip()}"


@pytest.mark.parametrize("name", [n for n in (*DOCUMENTS, *EXAMPLES) if n != "CHANGELOG.md"])
def test_documents_use_plain_words(name):
    """But for the changelog, which says what a thing was called before."""
    assert not list(plain_words(name))


ROOMS = (
    "xlstm_io",
    "xlstm_mcore",
    "pretrain",
    "data_prep",
    "slurm",
    "kernels",
    "benchmarks",
)


@pytest.mark.parametrize("room", ROOMS)
def test_code_uses_plain_words(room):
    files = sorted((ROOT / room).rglob("*.py"))
    found = [use for path in files for use in plain_words(str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_architecture_lists_every_room():
    """The house is a fenced block with one folder per line; hidden folders and tests/* are not."""
    house = re.search(r"## The house.*?```\n(.*?)```", read("ARCHITECTURE.md"), flags=re.S)
    listed = {line.split()[0].rstrip("/") for line in house.group(1).splitlines()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout, so what belongs to the tree is not known")
    folders = {path.rpartition("/")[0] for path in tracked if (ROOT / path).exists()}
    rooms = {f for f in folders if f and not f.startswith((".", "tests/"))}
    assert listed == rooms


def test_the_five_files_to_read_first_say_what_they_are():
    text = read("ARCHITECTURE.md").split("## Read these five first")[1].split("\n## ")[0]
    files = re.findall(r"^\d\. \[(.*?)\]", text, flags=re.M)
    assert len(files) == 5
    for file in files:
        assert ast.get_docstring(ast.parse(read(file)))


def test_the_exit_codes_are_those_of_the_code():
    assert exit_code_table() in read("docs/exit-codes.md")


RUN_KEY = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)[`: ]")
NESTED_KEYS = {
    f"{key}.{name}"
    for key, field in FIELDS.items()
    for name in getattr(field.annotation, "model_fields", ())
}


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if n != "docs/configuration.md"])
def test_keys_of_a_run_file_exist(name):
    known = {*FIELDS, *NESTED_KEYS, *OLD_KEYS, "cursor.plan", "tokenizer.sha256"}
    for key in RUN_KEY.findall(prose(name)):
        if not key.endswith((".json", ".yaml", ".md", ".py")):
            assert key in known, f"{name} names {key}"


def test_flags_of_other_trainers_are_answered_on_their_page():
    text = read("docs/from-megatron.md")
    for theirs, ours in _NAMED_ELSEWHERE.items():
        assert f"`{ours}" in text, f"{theirs} is {ours}, which docs/from-megatron.md does not name"


def test_the_page_about_slurm_lists_every_key_of_a_site_file():
    text = dict(sections("docs/slurm.md"))["Keys of the site file"]
    for name, field in Site.model_fields.items():
        for key in (name, *getattr(field.annotation, "model_fields", ())):
            assert f"`{key}`" in text, f"{name}: {key} is not in the table"


def test_numbers_at_the_head_of_the_benchmarks_are_those_of_their_sections():
    page = read("docs/benchmarks.md")
    rows = re.findall(r"^\| (.*?) \| (.*?) \| \[.*?\]\(#(.*?)\) \|$", page, flags=re.M)
    assert len(rows) >= 8
    bodies = {anchor_of(heading): text for heading, text in sections("docs/benchmarks.md")}
    for question, answer, anchor in rows:
        for number in re.findall(r"\d+(?:[.,]\d+)*", f"{question} {answer}"):
            assert number in bodies[anchor], f"{question} {number} is not in {anchor}"
