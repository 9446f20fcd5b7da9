"""Compare an exported folder, loaded by transformers, with the checkpoint it was made from.

Every tensor is compared by its hash. Logits are compared with one layer of each model in memory, so
the size of the model does not matter. What needs the whole model (generation, padding) is done
where it is small, and otherwise named as not done.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import xlstm_mcore.hf
from xlstm_io.checkpoint.manifest import resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.safetensors_stream import bytes_of
from xlstm_io.foreign.json_file import checked, read_json
from xlstm_io.foreign.untrusted import LIMITS
from xlstm_io.storage import Location, file_size
from xlstm_io.tensor_files import TensorFiles, open_tensors, read_json_file
from xlstm_io.tokenizer import Tokenizer, open_tokenizer
from xlstm_io.tokenizer.base import HF_CONFIG_NAME
from xlstm_mcore.checked_model import model_of
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.export.folder import MARKER
from xlstm_mcore.convert.export.to_hf import check_tensors, with_rows
from xlstm_mcore.convert.export.weights import DTYPES, Plan, plan_files, read_row
from xlstm_mcore.convert.families import FAMILIES
from xlstm_mcore.convert.proof.streamed import loading, our_logits, their_model
from xlstm_mcore.convert.tokenizer.write import check_folder
from xlstm_mcore.settings import ModelConfig

Logits = Callable[[Tensor], Tensor]

#: (rows, length) of the compared batches: a token, less than a chunk of 64, one, and several.
BATCHES = ((3, 1), (2, 15), (2, 64), (1, 300))
#: Largest difference of logits whose largest is 5 or less; of larger ones, in proportion.
TOLERANCE = 1e-4
#: Parameters up to which the whole model is loaded for what needs it.
SMALL = 500_000_000
REPORT, PAGE = "parity.json", "parity.md"


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        name: What was compared.
        passed: Whether it agreed; None if it was not done.
        detail: What was found, or why it was not done.
    """

    name: str
    passed: bool | None
    detail: str


class Marker(BaseModel):
    """What `xlstm_export.json` says, as far as it is used here."""

    model_config = ConfigDict(strict=True, frozen=True)

    family: Literal[tuple(FAMILIES)]
    dtype: Literal[tuple(DTYPES)]
    vocab_size: PositiveInt
    parameters: PositiveInt
    auto_tokenizer: bool


def verify(checkpoint: Location | str, folder: Path | str) -> list[Check]:
    """Compare a folder with its checkpoint and write `parity.json` and `parity.md` into it.

    Args:
        checkpoint: A checkpoint, or a run folder (then its newest complete checkpoint).
        folder: What `to_hf.export` wrote.

    Raises:
        ConvertError: The folder is not an export of this checkpoint's model.
    """
    folder = Path(folder)
    about = read_marker(folder)
    with CheckpointReader(resolve(checkpoint)) as reader, open_tensors(folder) as theirs:
        model = model_of(reader.manifest, reader.path)
        family = FAMILIES[about.family]
        rows = check_tensors(reader, family, model)
        plan = plan_files(rows, about.vocab_size, about.dtype, 1 << 62)
        exported = with_rows(model, plan.vocab)
        checks = [_config(folder, family, exported), _tensors(reader, plan, theirs)]
        # Nothing is built that is larger than the checkpoint's model.
        sound = checks[0].passed and not _missing(plan, theirs)
        if sound:
            ours, nudged = (
                our_logits(reader, model, DTYPES[plan.dtype], nudged=n) for n in (False, True)
            )
            checks += _logits(ours, nudged, their_model(folder, theirs), exported)
        trained = (reader.manifest.state.get("tokenizer") or {}).get("sha256")
    exact = open_tokenizer(folder)
    checks += [
        _code(folder, family.NAME),
        _tokenizer(folder, exact, trained, about),
        _generation_config(folder, exact),
    ]
    if sound and about.parameters <= SMALL:
        checks += whole_model_checks(load_exported(folder), family.NAME)
    elif not sound:
        checks.append(Check("logits", None, "the folder does not hold the checkpoint's model"))
    else:
        why = f"the model has more than {SMALL:,} parameters, and they would all be in memory"
        checks += [Check(name, None, why) for name in ("generation with a cache", "padding")]
    _write_report(reader.path.name, folder, checks)
    return checks


def passed(checks: list[Check]) -> bool:
    """Whether nothing differed."""
    return all(check.passed is not False for check in checks)


def load_exported(folder: Path | str) -> PreTrainedModel:
    """The exported model by transformers, fp32, evaluation mode."""
    disable_progress_bar()  # loading takes a moment, and the bar would litter a log
    with loading(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()


def whole_model_checks(model: PreTrainedModel, family: str) -> list[Check]:
    """What needs the whole exported model in memory."""
    vocab = getattr(model.config, "vocab_tokens", None) or model.config.vocab_size
    tokens = torch.randint(vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(tokens)
    options = {"attention_mask": ones, "do_sample": False, "max_new_tokens": 12}
    with torch.no_grad():
        # Compared by logits: of two equal ones, either may be taken.
        written = model.generate(tokens, use_cache=True, eos_token_id=None, **options)
        logits = model(written, use_cache=False).logits[:, tokens.shape[1] - 1 : -1, :vocab]
        chosen = logits.gather(-1, written[:, tokens.shape[1] :, None]).squeeze(-1)
        worst = (logits.amax(-1) - chosen).max().item()
        limit = _limit(logits)
        checks = [
            Check(
                "generation with a cache",
                worst <= limit,
                f"greedy tokens are within {worst:.1e} of the largest logit without a cache",
            )
        ]
        if family == "xlstm":
            why = "transformers' xlstm ignores the attention mask: do not pad"
            return [*checks, Check("padding", None, why)]
        padded = torch.cat((torch.zeros_like(tokens[:1, :4]), tokens[:1, :5]), dim=1)
        mask = ones.clone()
        mask[0, :4] = 0
        together = model(torch.cat((padded, tokens[1:])), attention_mask=mask, use_cache=False)
        alone = model(tokens[:1, :5], use_cache=False).logits[..., :vocab]
        worst = (together.logits[:1, 4:, :vocab] - alone).abs().max().item()
        detail = f"a row padded on the left differs by {worst:.1e} from the row alone"
        return [*checks, Check("padding", worst <= _limit(alone), detail)]


def samples(exported: PreTrainedModel, folder: Path | str) -> list[str]:
    """A few texts that transformers generates from bos, sampled with a fixed seed."""
    tokenizer = open_tokenizer(Path(folder))
    prompt = torch.tensor([[tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]])
    torch.manual_seed(0)
    texts = []
    for _ in range(3):
        ids = exported.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48)
        texts.append(tokenizer.decode([i for i in ids[0, 1:].tolist() if i < tokenizer.vocab_size]))
    return texts


def read_marker(folder: Path) -> Marker:
    """What an export says about itself.

    Raises:
        ConvertError: The folder is not an export of this version.
        OSError: Something in it is not a plain file.
    """
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder} is not an exported folder: it has no config.json")
    for path in folder.iterdir():
        if not path.is_dir():
            file_size(path, links=True)  # transformers would wait for ever at a pipe
    remedy = "export the checkpoint again"
    try:
        said = read_json(folder / MARKER, LIMITS.note, remedy=remedy, error=ConvertError)
    except FileNotFoundError:
        raise ConvertError(
            f"{folder} is not an export of this version: {MARKER} is missing; {remedy}"
        ) from None
    return checked(Marker, said, named_in=folder / MARKER, remedy=remedy, error=ConvertError)


def _missing(plan: Plan, theirs: TensorFiles) -> bool:
    wanted = {row.theirs: plan.shape(row) for row in plan.rows}
    return wanted != {name: info.shape for name, info in theirs.infos.items()}


def _config(folder: Path, family: ModuleType, model: ModelConfig) -> Check:
    """The keys of config.json that say what the model is; others may have been added."""
    said = read_json_file(folder / "config.json")
    wanted = json.loads(json.dumps(family.config(model) | {"vocab_size": model.vocab_size}))
    other = sorted(key for key, value in wanted.items() if said.get(key) != value)
    if other:
        return Check("config", False, f"not the model's: {', '.join(other[:5])}")
    return Check("config", True, f"{len(wanted)} keys are the model's")


def _tensors(reader: CheckpointReader, plan: Plan, theirs: TensorFiles) -> Check:
    """Every tensor, by the hash of its bytes."""
    wrong = sorted({row.theirs for row in plan.rows} ^ theirs.infos.keys())
    if wrong:
        return Check("tensors", False, f"missing or too many: {', '.join(wrong[:5])}")
    for row in plan.rows:
        info = theirs.infos[row.theirs]
        # One after the other: no two large tensors are in memory at once.
        ours = _identity(read_row(reader, row, plan))
        if (info.dtype, info.shape) != ours[:2] or _identity(theirs.read(row.theirs)) != ours:
            wrong.append(row.theirs)
    if wrong:
        return Check("tensors", False, f"{len(wrong)} differ, such as {', '.join(wrong[:5])}")
    return Check("tensors", True, f"{len(plan.rows)} tensors have the same bytes")


def _identity(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], str]:
    digest = xxhash.xxh3_64_hexdigest(bytes_of(tensor.contiguous()))
    return tensor.dtype, tuple(tensor.shape), digest


def _logits(
    ours: Logits, nudged: Logits, theirs: PreTrainedModel, exported: ModelConfig
) -> list[Check]:
    """Logits of random tokens, for every shape of `BATCHES`.

    Rows of the exported vocabulary without a token must get none.

    There are models whose logits fp32 does not define as exactly as the limit: rounding the output
    of the embedding another way changes them more. Then that change, four times, is the limit.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = exported.vocab_tokens or exported.vocab_size
    checks = []
    for batch, length in BATCHES:
        tokens = torch.randint(vocab, (batch, length), generator=generator)
        wanted = ours(tokens).detach().cpu()[..., :vocab]
        with torch.no_grad():
            found = theirs(tokens, use_cache=False).logits
        worst = (wanted.double() - found[..., :vocab].double()).abs().max().item()
        if not found[..., vocab:].isneginf().all():
            worst = math.inf
        limit, scale = _limit(wanted), wanted.abs().max().item()
        if worst > limit:
            change = (nudged(tokens).cpu()[..., :vocab] - wanted).abs().max().item()
            limit = max(limit, 4 * change)
        detail = f"they differ by at most {worst:.1e} (limit {limit:.1e}, largest {scale:.2f})"
        # The comparison is false for NaN.
        checks.append(Check(f"logits of {batch} x {length} tokens", worst <= limit, detail))
    return checks


def _limit(logits: Tensor) -> float:
    return TOLERANCE * max(1.0, logits.abs().max().item() / 5)


def _code(folder: Path, family: str) -> Check:
    """Whether code in the folder is the code of this installation, which was run here."""
    source = Path(xlstm_mcore.hf.__file__).parent
    found = sorted(path.name for path in folder.glob("*.py"))
    other = [
        name
        for name in found
        if not (source / name).is_file()
        or (source / name).read_bytes() != (folder / name).read_bytes()
    ]
    if other:
        return Check("code", False, f"not the code of this version: {', '.join(other)}")
    return Check("code", True, ", ".join(found) or f"none is needed for {family}")


def _tokenizer(folder: Path, exact: Tokenizer, trained: str | None, about: Marker) -> Check:
    """AutoTokenizer against the tokenizer of training, on the corpus of texts."""
    if trained not in (None, exact.sha256):
        return Check("tokenizer", False, f"{exact.path.name} is not the file of training")
    if not about.auto_tokenizer:
        return Check("tokenizer", None, "AutoTokenizer is not to be used; see README.md")
    config = read_json_file(folder / HF_CONFIG_NAME)
    try:
        check_folder(folder, exact, remote_code="auto_map" in config)
    except ConvertError as error:
        return Check("tokenizer", False, f"AutoTokenizer is not the trained one: {error}")
    return Check("tokenizer", True, "AutoTokenizer gives the ids of training")


def _generation_config(folder: Path, exact: Tokenizer) -> Check:
    with loading(folder):
        config = GenerationConfig.from_pretrained(folder)
    found = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    wanted = (exact.bos_id, exact.eos_id, exact.pad_id)
    return Check("generation config", found == wanted, f"bos, eos and pad are {found}")


def _write_report(checkpoint: str, folder: Path, checks: list[Check]) -> None:
    body = {
        "checkpoint": checkpoint,
        "passed": passed(checks),
        "checks": [asdict(check) for check in checks],
    }
    (folder / REPORT).write_text(json.dumps(body, indent=2), encoding="utf-8")
    words = {True: "equal", False: "**different**", None: "not compared"}
    lines = [f"# This export beside the checkpoint {checkpoint}", "", "| what | result | detail |"]
    lines += ["|---|---|---|"]
    lines += [f"| {c.name} | {words[c.passed]} | {c.detail} |" for c in checks]
    (folder / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")
