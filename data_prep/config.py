"""Settings of a build: the keys of `prep.yaml` and the flags of the command line."""

import os
import re
from dataclasses import fields
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from data_prep.sources.documents import Fields, TextSplit
from data_prep.sources.filters import TextFilters
from data_prep.sources.malformed import MAX_BAD_SHARE
from data_prep.sources.rules import Rule, field_rule


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _usable_as_folder(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or value == "tokenizer":
        raise ValueError("must be letters, digits, '.', '_', '-' and not 'tokenizer'")
    return value


Inputs = Annotated[list[str], BeforeValidator(_one_is_a_list)]
SourceName = Annotated[str, AfterValidator(_usable_as_folder)]


class JobShare(NamedTuple):
    """Which part of a build this job does: it is number `job` (from 0) of `jobs`."""

    job: int
    jobs: int

    def of_shards(self, count: int) -> range:
        """The numbers of this job's shards among `count`.

        They are neighbours, and so lie in few files: of a compressed file all must be read that
        lies before a shard.
        """
        return range(count * self.job // self.jobs, count * (self.job + 1) // self.jobs)


ALONE = JobShare(0, 1)


class TextConfig(BaseModel):
    """What describes the texts of a corpus, in `sources` and for a single corpus alike."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text_field: str = "text"
    """Field (jsonl) or column (parquet, arrow) of the text."""
    id_field: str = "id"
    """Field or column of the document's name, for messages."""
    text_split: TextSplit = "file"
    """What of a text file is one document: file, lines, or paragraphs (between blank lines)."""
    prompt_field: str = ""
    """Field or column of a text that is not learnt; with completion_field."""
    completion_field: str = ""
    """Field or column of the text that follows the prompt, and is learnt."""
    segments_field: str = ""
    """Field (jsonl) of a list of {text, loss: true|false}: the parts of a text, where those with
    loss: true are learnt."""
    licence: str = ""
    """Note for the manifest, beside what SOURCE.json in the inputs' folders says."""
    origin: str = ""
    """Note for the manifest: where the corpus comes from."""


class SourceConfig(TextConfig):
    """One named corpus among `sources`."""

    name: SourceName
    """A folder in OUT; blends of the trainer name it."""
    input: Inputs = Field(min_length=1)
    """Files, folders, quoted globs or URLs."""
    keep: dict[str, Rule] = Field(default_factory=dict, max_length=100)
    """Rules on other fields: the values that are kept, or {min:, max:, none_of:}."""
    sample: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the documents that is taken, chosen by the hash of the text. A larger share has the
    documents of a smaller one, too."""

    @property
    def fields(self) -> Fields:
        """Where readers find the documents."""
        rules = tuple(field_rule(name, rule) for name, rule in self.keep.items())
        labelled = (self.prompt_field, self.completion_field, self.segments_field)
        return Fields(self.text_field, self.id_field, self.text_split, rules, *labelled)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.prompt_field) != bool(self.completion_field):
            raise ValueError("prompt_field and completion_field belong together")
        if self.prompt_field and self.segments_field:
            raise ValueError("give either prompt_field and completion_field, or segments_field")
        return self

    def labelled_fields(self) -> dict[str, str]:
        """The fields of what is learnt and what is not, where they are set."""
        names = ("prompt_field", "completion_field", "segments_field")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def choice(self) -> dict[str, Any]:
        """`keep` and `sample` where they are set, as manifests show them."""
        chosen: dict[str, Any] = {}
        if self.keep:
            chosen["keep"] = self.model_dump(exclude_defaults=True)["keep"]
        if self.sample < 1:
            chosen["sample"] = self.sample
        return chosen


class BuildConfig(TextConfig):
    """Settings of a build: keys of `prep.yaml` and flags of the command line alike."""

    input: Inputs = Field(default_factory=list)
    """Files, folders, quoted globs or URLs: jsonl, parquet, arrow, text; also compressed."""
    tokenizer: str
    """Folder of a tokenizer (`python -m data_prep tokenizer`), or a SentencePiece .model file."""
    out: str
    """Folder for the shards."""
    seq_len: int = Field(256, ge=2)
    """Context length: a row holds seq_len + 1 tokens."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Rows as one chopped stream, or documents kept whole and rows filled up with padding."""
    valid_fraction: float = Field(0.01, ge=0.0, le=0.5)
    """Share of the documents for validation, chosen by the hash of the text."""
    source: SourceName = "corpus"
    """Name of the corpus: a folder in OUT."""
    extends: str = ""
    """A finished folder of shards: OUT gets its shards as they are (hard links), and new ones of
    the files of input that it does not have."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """Several corpora (in prep.yaml, instead of input): name, input, text_field, licence, ..."""
    min_chars: int = Field(0, ge=0)
    """Drop shorter texts."""
    max_chars: int = Field(0, ge=0)
    """Drop longer texts; 0: no limit."""
    min_letter_share: float = Field(0.0, ge=0.0, le=1.0)
    """Drop texts with fewer letters among their visible characters."""
    max_repeated_line_share: float = Field(1.0, ge=0.0, le=1.0)
    """Drop texts in which more of the lines repeat an earlier one."""
    max_mean_word_chars: float = Field(0.0, ge=0.0)
    """Drop texts whose words are longer on average; 0: no limit."""
    filter_functions: list[str] = Field(default_factory=list)
    """Functions of your own, module:function, that say whether a text is kept. They are run only
    with --allow-functions, which no file can give."""
    shard_mb: float = Field(64.0, gt=0)
    """Megabytes of text per shard. A shard is what one worker writes, and what is redone after a
    kill."""
    max_bad_share: float = Field(MAX_BAD_SHARE, ge=0.0, le=1.0)
    """Share of malformed records, or of their bytes, above which the build refuses the corpus. Of
    a single file more than half is refused, unless this is larger."""
    workers: int = Field(0, ge=0)
    """Processes; 0 takes every core that the job may use. Does not change the output."""
    task: int | None = None
    """This job's number among `tasks`, from 0; default: its place in the Slurm array."""
    tasks: int | None = Field(None, ge=1)
    """Jobs that share the build; each writes its shards, then `merge OUT` the manifest."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if bool(self.input) == bool(self.sources):
            problems.append("give either input or sources")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            problems.append(f"sources: the names {', '.join(names)} must differ")
        if (self.task is None) != (self.tasks is None) and self.tasks != 1:
            problems.append("task and tasks belong together")
        if self.task is not None and not 0 <= self.task < (self.tasks or 1):
            problems.append(f"task={self.task} must lie between 0 and tasks - 1")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def all_sources(self) -> list[SourceConfig]:
        """`sources`, or the one corpus that the plain keys describe."""
        if self.sources:
            return self.sources
        shared = SourceConfig.model_fields.keys() & BuildConfig.model_fields.keys()
        return [SourceConfig(name=self.source, **{key: getattr(self, key) for key in shared})]

    @property
    def labels(self) -> bool:
        """Whether the shards have labels: some source says what is learnt and what is not."""
        return any(source.labelled_fields() for source in self.all_sources())

    def filters(self) -> TextFilters:
        """The rules for leaving texts out."""
        names = [field.name for field in fields(TextFilters) if field.name != "functions"]
        rules = {name: getattr(self, name) for name in names}
        return TextFilters(**rules, functions=tuple(self.filter_functions))

    def settings(self) -> dict[str, Any]:
        """What the contents of the shards depend on, besides corpus and tokenizer."""
        names = ("seq_len", "packing", "valid_fraction", "shard_mb")
        sources = {
            source.name: f"{source.text_field!r} of {source.text_split}"
            + "".join(
                f", {key} {value}"
                for key, value in {**source.choice(), **source.labelled_fields()}.items()
            )
            for source in self.all_sources()
        }
        chosen = {name: getattr(self, name) for name in names}
        return {**chosen, "sources": sources, "filters": self.filters().settings()}

    def share(self) -> JobShare:
        """This job's part of the build: from the keys, else from the Slurm array.

        Raises:
            ValueError: the numbers of the array have gaps.
        """
        if self.tasks is not None:
            return JobShare(self.task or 0, self.tasks)
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            return ALONE
        number, count = (int(os.environ[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "COUNT"))
        first, last = (int(os.environ[f"SLURM_ARRAY_TASK_{key}"]) for key in ("MIN", "MAX"))
        if last - first + 1 != count:
            raise ValueError(
                f"a Slurm array of {count} tasks numbered {first} to {last} has gaps; number it "
                "without, or give --task and --tasks to do the share of one task again"
            )
        return JobShare(number - first, count)
