"""`evaluation.prompts`: how the model continues some texts at every evaluation."""

from pathlib import Path

from pretrain.checkpoint import Ranks
from pretrain.config import RunConfig
from pretrain.engines.base import Engine
from pretrain.evaluation.sample_file import Sample, append_samples
from pretrain.layout import Layout
from pretrain.supervision.watchdog import EVALUATION, Watchdog
from xlstm_io.errors import ConfigError
from xlstm_io.shards.manifest import Manifest
from xlstm_io.signals import StopSignal
from xlstm_io.tokenizer import open_tokenizer
from xlstm_io.tokenizer.base import Tokenizer
from xlstm_io.tokenizer.text_stream import TextStream


class Samples:
    """Continues the prompts of a run; the same on all ranks.

    Args:
        config: the run.
        layout: where this process stands.
        manifest: of the training data, for its tokenizer.
        ranks: who opens the tokenizer together: the first rank does.

    Raises:
        ConfigError: a prompt with its continuation is longer than a row.
        UserError: the tokenizer cannot be opened.
    """

    def __init__(self, config: RunConfig, layout: Layout, manifest: Manifest, ranks: Ranks) -> None:
        options = config.evaluation
        self._layout, self._prompts, self._new = layout, options.prompts, options.prompt_tokens
        self._folder = Path(config.run.dir)
        self._ids: list[list[int]] = []
        if not self._prompts:
            return

        def encode() -> list[list[int]]:
            self._tokenizer = open_tokenizer(manifest.tokenizer_path)
            return [self._tokenizer.prompt_ids(text) for text in self._prompts]

        self._tokenizer: Tokenizer | None = None  # on the rank that writes alone
        self._ids = ranks.first("encoding evaluation.prompts", encode)
        for number, ids in enumerate(self._ids):
            if len(ids) + self._new > config.data.seq_len:
                raise ConfigError(
                    f"evaluation.prompts[{number}] has {len(ids)} tokens, and with "
                    f"evaluation.prompt_tokens={self._new} more it does not fit into "
                    f"data.seq_len={config.data.seq_len}; shorten one of them"
                )
        self._end = manifest.eos_id

    def take(self, engine: Engine, step: int, stop: StopSignal, watchdog: Watchdog) -> list[Sample]:
        """Continue the prompts, and add them to the run's file; called by all ranks.

        Args:
            engine: holds the model.
            step: finished steps.
            stop: the request to stop; all ranks leave together when one of them has heard it.
            watchdog: is told at every token.

        Returns:
            The samples, on the main rank; none elsewhere, and after a request to stop.
        """
        if not self._ids:
            return []
        texts = [list(ids) for ids in self._ids]
        open_ends = set(range(len(texts)))
        for _ in range(self._new):
            watchdog.moved(EVALUATION, step)
            if self._layout.any(stop.requested):
                return []
            for number, token in enumerate(engine.next_tokens(texts)):
                if number in open_ends:
                    texts[number].append(token)
                    if token == self._end:
                        open_ends.discard(number)
            if not open_ends:
                break
        if self._tokenizer is None:
            return []
        samples = [
            Sample(step, prompt, self._added(ids, text))
            for prompt, ids, text in zip(self._prompts, self._ids, texts, strict=True)
        ]
        append_samples(self._folder, samples)
        return samples

    def _added(self, prompt: list[int], text: list[int]) -> str:
        """What follows a prompt, as `generate` writes it: an id may spell a part of a character."""
        assert self._tokenizer is not None
        stream = TextStream(self._tokenizer, prompt)
        parts = [stream.push(token) for token in text[len(prompt) :] if token != self._end]
        return "".join([*parts, stream.finish()])
