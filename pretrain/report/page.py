"""One self-contained HTML page about a run, or about several side by side."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from pretrain.report.figures import loss_figure, name_of, source_figure, value_figure
from pretrain.report.layers import layer_figures
from pretrain.report.runs import RunRecord
from pretrain.watching.progress import duration

# Keys that differ between any two runs and explain nothing.
_EXPECTED = ("run.dir", "checkpoint.dir", "data.cache_dir")


def write_page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML; figures are in it, so that the file alone can be sent to somebody.

    Args:
        runs: one run, or several that are compared.
    """
    from jinja2 import Environment, StrictUndefined

    template = files("pretrain.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    # Names of folders and messages of old runs are text, never markup.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=", ".join(name_of(run) for run in runs),
        names=[name_of(run) for run in runs],
        facts=_facts(runs),
        differences=differences(runs) if len(runs) > 1 else [],
        compared=len(runs) > 1,
        losses=_images(
            [
                ("Loss by step", loss_figure(runs, "step")),
                ("Loss by tokens", loss_figure(runs, "tokens")),
            ]
        ),
        values=_images(
            [
                ("Loss by source, smoothed", source_figure(runs)),
                ("Learning rate", value_figure(runs, "lr", "learning rate")),
                (
                    "Gradient norm",
                    value_figure(runs, "grad_norm", "gradient norm before clipping", log=True),
                ),
                ("Speed", value_figure(runs, "tokens_per_second", "tokens per second")),
                ("Utilisation", value_figure(runs, "mfu", "share of the device's peak (MFU)")),
                ("Wait for data", value_figure(runs, "data_wait_seconds", "seconds per step")),
                (
                    "Skipped steps",
                    value_figure(runs, "skipped", "steps without an update")
                    if any(any(run.points("skipped")[1]) for run in runs)
                    else None,
                ),
            ]
        ),
        layers=_images(layer_figures(runs[0])) if len(runs) == 1 else [],
        stories=[(name_of(run), story(run)) for run in runs],
        samples=[(name_of(run), run.samples) for run in runs if run.samples],
        origins=[
            (name_of(run), json.dumps(run.provenance, indent=2)) for run in runs if run.provenance
        ],
        configurations=[
            (name_of(run), json.dumps(run.config.model_dump(mode="json"), indent=2)) for run in runs
        ],
    )


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The keys in which the configurations differ, with each run's value in words."""
    flat = [_flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = {key: None for one in flat for key in one}
    return [
        (key, [_word(one.get(key)) for one in flat])
        for key in keys
        if key not in _EXPECTED and len({_word(one.get(key)) for one in flat}) > 1
    ]


def story(run: RunRecord) -> list[tuple[str, str, str]]:
    """What happened to a run: when, at which step, and what, one line for each event."""
    lines = []
    for event in run.history:
        step = event.get("step")
        lines.append(
            (str(event.get("time", "")), "" if step is None else f"{step:,}", _told(event))
        )
    return lines


def _told(event: Mapping[str, Any]) -> str:
    """One event of the history in words."""
    if event.get("event") != "start":
        about = ("event", "time", "step", "life", "reason")
        told = [str(event["reason"])] if event.get("reason") else []
        told += [f"{key} {_word(value)}" for key, value in event.items() if key not in about]
        return ": ".join([str(event.get("event", "event")), *(["; ".join(told)] if told else [])])
    words = [f"life {event.get('life')} starts with {event.get('processes')} processes"]
    words.append(f"from {event['checkpoint']}" if event.get("checkpoint") else "from nothing")
    words += [
        f"{change['key']} {_word(change['before'])} -> {_word(change['now'])}"
        for change in event.get("changes", ())
    ]
    words += [str(note) for note in event.get("notes", ())]
    return "; ".join(words)


def _facts(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The table at the top: a fact per row, a run per column; rows that nobody has are left out."""
    rows = {name: [tell(run) for run in runs] for name, tell in _FACTS.items()}
    return [(name, cells) for name, cells in rows.items() if any(cells)]


def _number(key: str, form: str, unit: str = "", scale: float = 1.0) -> Any:
    def tell(run: RunRecord) -> str:
        value = run.summary.get(key)
        return "" if value is None else f"{value / scale:{form}}{unit}"

    return tell


def _memory(run: RunRecord) -> str:
    peak = run.summary.get("peak_memory_bytes")
    return f"{peak['max'] / 2**30:.2f} GiB" if isinstance(peak, Mapping) else ""


_FACTS = {
    "state": lambda run: "finished" if run.summary["finished"] else "not finished",
    "steps": lambda run: f"{run.summary['steps']:,} of {run.config.run.steps:,}",
    "pattern": lambda run: run.config.model.pattern,
    "parameters": _number("parameters", ",.2f", " M", 1e6),
    "tokens": _number("tokens", ",.0f"),
    "validation loss": _number("valid_loss", ".4f", " nats per token"),
    "speed": _number("tokens_per_second", ",.0f", " tokens/s"),
    "time in steps": lambda run: (
        duration(run.summary["seconds"]) if "seconds" in run.summary else ""
    ),
    "peak memory of a process": _memory,
    "lives": lambda run: str(sum(e.get("event") == "start" for e in run.history) or ""),
}


def _images(figures: Sequence[tuple[str, bytes | None]]) -> list[tuple[str, str]]:
    return [(name, base64.b64encode(png).decode()) for name, png in figures if png is not None]


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: one
        for part, inner in value.items()
        for key, one in _flatten(inner, f"{name}.{part}" if name else part).items()
    }


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
