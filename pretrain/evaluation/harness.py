"""lm-evaluation-harness: a checkpoint as its `LM`, and a run of its tasks.

The harness asks for three things: the log-likelihood of a text after another, that of a whole text,
and a greedy continuation. The first two are `xlstm_mcore.scoring`, the third is
`xlstm_mcore.generation`. Under a launcher every rank holds a part of the model (tensor parallel)
and answers the same requests, so the harness sees one process.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from pretrain.commands.after_run.generate import check_split
from xlstm_io.checkpoint.choose import choose
from xlstm_io.errors import UserError, first_line
from xlstm_io.storage import replacing
from xlstm_io.terminal import say
from xlstm_io.tokenizer.base import Tokenizer
from xlstm_mcore.generation.generate import generate
from xlstm_mcore.generation.settings import Sampling
from xlstm_mcore.inference import load_model
from xlstm_mcore.model import XLSTMModel
from xlstm_mcore.scoring import Row, score

MAX_NEW_TOKENS = 256  # where a task names no number, as in the harness's own models


class CheckpointLM(TemplateLM):
    """A model with its tokenizer, as the harness wants it.

    A document begins with bos, as in training; nothing is cut, however long it is.

    Args:
        model: a whole model, in one process or tensor parallel.
        tokenizer: of the model.
        batch: texts that are computed together at most.
    """

    def __init__(self, model: XLSTMModel, tokenizer: Tokenizer, batch: int = 16) -> None:
        super().__init__()
        self.model, self.words, self.batch = model, tokenizer, batch
        self.ids = tokenizer.document_ids()
        self.shows = model.tp_group.rank() == 0

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.ids.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.ids.bos

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its cached requests under."""
        return self.words.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; behind bos, unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.words.encode([string])[0].tolist()
        return self.words.prompt_ids(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [Row([*context, *text], len(context)) for _, context, text in requests]
        # A text of no tokens is certain.
        asked = [number for number, row in enumerate(rows) if len(row.tokens) > row.first]
        found = [(0.0, True)] * len(rows)
        with self._bar(len(asked), disable_tqdm) as bar:
            scores = score(
                self.model, [rows[n] for n in asked], batch=self.batch, on_done=bar.update
            )
        for number, one in zip(asked, scores, strict=True):
            found[number] = (one.log_likelihood, one.greedy)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each as one document of any length."""
        bos = self.ids.bos
        texts = [self.words.encode([one.args[0]])[0].tolist() for one in requests]
        asked = [(None, [bos], ids) for ids in texts]
        return [value for value, _ in self._loglikelihood_tokens(asked, disable_tqdm)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop text, greedily unless a task asks for samples."""
        found: list[str] = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for number, one in enumerate(requests):
            groups.setdefault(_sampling(one.args[1]), []).append(number)
        with self._bar(len(requests), disable_tqdm) as bar:
            for sampling, numbers in groups.items():
                done = generate(
                    self.model,
                    self.words,
                    [requests[number].args[0] for number in numbers],
                    sampling,
                    numbers=numbers,
                    batch=self.batch,
                    on_done=lambda completion: bar.update(),
                )
                for number, completion in zip(numbers, done, strict=True):
                    found[number] = completion.text
        return found

    def _bar(self, total: int, disabled: bool) -> tqdm:
        return tqdm(total=total, unit="text", disable=None if self.shows and not disabled else True)


def _sampling(wanted: dict[str, Any]) -> Sampling:
    """How a task wants its texts continued."""
    until = wanted.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or MAX_NEW_TOKENS
    samples = bool(wanted.get("do_sample", False))
    return Sampling(
        max_tokens=int(limit),
        temperature=float(wanted.get("temperature", 1.0)) if samples else 0.0,
        top_k=int(wanted.get("top_k", 0)),
        top_p=float(wanted.get("top_p", 1.0)),
        stop=tuple(text for text in until if text),
    )


def main(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    which: str | None = None,
    include: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    precision: str = "fp32",
    tokenizer: str | None = None,
    out: str | None = None,
) -> int:
    """Run tasks of the harness and print their table.

    Args:
        checkpoint: a checkpoint or a run folder.
        tasks: names of tasks or groups.
        which: which checkpoint of a run; see `xlstm_io.checkpoint.choose`.
        include: a folder with the YAML files of more tasks.
        fewshot: examples before each question; None for what the task says.
        limit: items of each task at most.
        batch: texts that are computed together at most.
        precision: "fp32" or "bf16", of weights and activations.
        tokenizer: a tokenizer's file or folder; by default the one in the checkpoint.
        out: file for the results as JSON.

    Returns:
        0.

    Raises:
        UserError: no checkpoint, no such task, or its data cannot be had.
    """
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include={include} is not a folder of tasks")
    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: the harness knows no {', '.join(unknown)}; see `lm_eval ls tasks`, or name "
            "the folder of your own with --include"
        )
    path = choose(checkpoint, which)
    check_split(path)
    model, words = load_model(path, tokenizer=tokenizer, precision=precision)
    adapter = CheckpointLM(model, words, batch)
    with _data_errors(tasks):
        opened = [task for name in tasks for task in _open(manager, name)]
    found = simple_evaluate(
        adapter,
        tasks=opened,
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    if not adapter.shows or found is None:
        return 0
    say(f"{path}\n{make_table(found)}")
    if found.get("groups"):
        say(make_table(found, "groups"))
    if out is not None:
        body = {"checkpoint": str(path), **found}
        with replacing(Path(out)) as file:
            file.write(json.dumps(body, indent=1, default=handle_non_serializable).encode())
    return 0


def _open(manager: TaskManager, name: str) -> list[Any]:
    """A group of tasks, or the tasks of a name, with their data."""
    loaded = manager.load([name])
    groups = list(loaded["groups"].values())
    return groups[:1] or list(loaded["tasks"].values())  # the first group holds the others


@contextmanager
def _data_errors(tasks: Sequence[str]) -> Iterator[None]:
    """The harness opens a task's data when it makes the task; what goes wrong there is not ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--tasks {','.join(tasks)}: the data cannot be opened: {first_line(error)}"
        ) from error
