"""A checkpoint's model card: what it is, what it was trained on and how, how to run it, what was measured of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from xr0_engine.evaluation.rates import conditions
from xr0_engine.evaluation.results import Results
from xr0_engine.evaluation.tables import title, told_headline
from xr0_engine.family import FAMILIES
from xr0_engine.files import is_number
from xr0_engine.hub import hub_id
from xr0_engine.publish.folder import FIDELITY_FILES, Publishable, fidelity, image_settings
from xr0_engine.publish.run import Run
from xr0_engine.sizes import published_config

TAGS = ("robotics", "vision-language-action", "xr0-engine")
_MARK = "\n<!-- written by xr0 push, which replaces it as long as nobody changes it: "
LICENSE = "# license: which one is yours to choose: https://huggingface.co/docs/hub/repositories-licenses\n"


def model_card(name: str, made: Publishable, run: Run | None, results: Sequence[Results]) -> str:
    """README.md of a repository `name`, `organisation/name`. run: that made the checkpoint, if it is known."""
    parts = [
        f"# {name.rpartition('/')[2]}",
        *_about(made),
        "## Run it",
        *_running(name, next(iter(made.statistics))),
        "## Robot types",
        *_robots(made),
        "## Training",
        *_training(run),
        "## Evaluation",
        *_evaluation(made, run, results),
    ]
    text = _front_matter(made, run) + "\n" + "\n\n".join(parts) + "\n"
    return text + _mark(text)


def is_untouched(card: str) -> bool:
    """Whether model_card wrote it and nobody has changed it since."""
    text, begin, _ = card.rpartition(_MARK)
    return bool(begin) and card.strip() == (text + _mark(text)).strip()


def _mark(text: str) -> str:
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _front_matter(made: Publishable, run: Run | None) -> str:
    told: dict[str, Any] = {"library_name": "xr0-engine", "pipeline_tag": "robotics", "tags": [*TAGS]}
    told["tags"].append(FAMILIES[made.config.family].title.lower())
    source = "" if made.quantization is None else made.quantization.source
    whole, base = hub_id(source), None if run is None else hub_id(run.base)
    if whole is not None:
        told |= {"base_model": whole.name, "base_model_relation": "quantized"}
    elif base is not None:
        told |= {"base_model": base.name, "base_model_relation": "finetune"}
    named = [dataset.on_hub for dataset in ([] if run is None else run.datasets)]
    if datasets := sorted({found.name for found in named if found is not None}):
        told["datasets"] = datasets
    return f"---\n{LICENSE}{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}---\n"


def _about(made: Publishable) -> Iterator[str]:
    count = sum(place.num_elements for place in made.stored.values())
    head = made.config.head
    sizes = "the published sizes" if made.config.text == published_config().text else "sizes of its own"
    yield (
        f"A vision-language-action policy for robots: {FAMILIES[made.config.family].title}, of {sizes}, {count:,} "
        f"numbers in {len(made.stored)} tensors. Camera images, a task in words and the robot's state in, "
        f"{head.flow_steps} flow steps, a chunk of actions out; prefixes of up to {head.max_prefix} actions."
    )
    pixels = [image_settings(made.folder).get(key) for key in ("min_pixels", "max_pixels")]
    if all(map(is_number, pixels)):
        yield f"Images of {pixels[0]:,} to {pixels[1]:,} pixels."
    if (eight := made.quantization) is not None:
        formats = ", ".join(f"{count} layers {name}" for name, count in Counter(eight.layers.values()).items())
        yield f"In 8 bits, from {eight.source} by recipe `{eight.recipe}`: {formats}."


def _running(name: str, robot_type: str) -> Iterator[str]:
    yield "With xr0-engine; `xr0 serve` puts it on a network, `xr0 inspect` shows what it holds:"
    yield (
        "```python\nfrom xr0_engine import Engine\n"
        f'engine = Engine.from_pretrained("{name}")\n'
        f'chunk = engine.infer(engine.example("{robot_type}"), seed=0)  # your Observation in its place\n```'
    )


def _robots(made: Publishable) -> Iterator[str]:
    yield "Actions are normalised by the training data's statistics, per step of the chunk and column."
    rows = []
    for name, statistics in made.statistics.items():
        active = statistics.action_mask.any(0)
        std = statistics.std[:, active]
        spread = f"{std.min():.3g} to {std.max():.3g}" if std.size else "–"
        rows.append((name, statistics.chunk_length, int(active.sum()), spread))
    yield _table(("robot type", "actions in a chunk", "active columns", "their std, robot units"), rows)


def _training(run: Run | None) -> Iterator[str]:
    if run is None:
        yield "Not told."
        return
    told = "" if run.is_its_own else " Which run made it was said by whoever published it."
    yield f"Recipe `{run.recipe}` of `xr0 train`, from {run.base}.{told}"
    if run.settings:
        yield "What differs from the recipe:"
        yield _table(("setting", "value"), [(f"`{key}`", _value(value)) for key, value in run.settings.items()])
    rows = []
    for dataset in run.datasets:
        found = dataset.on_hub
        shown = dataset.name
        if found is not None:
            revision = "" if found.revision is None else f", revision `{found.revision}`"
            shown = f"[{found.name}](https://huggingface.co/datasets/{found.name}){revision}"
        rows.append((shown, dataset.of, dataset.weight or "1"))
    yield _table(("data", "for", "weight"), rows)


def _evaluation(made: Publishable, run: Run | None, results: Sequence[Results]) -> Iterator[str]:
    validation = {} if run is None else run.validation
    if validation:
        yield (
            f"Open loop, on episodes that were held out, after {validation['step']:.0f} steps: L1 "
            f"{validation['l1']:.4g} in robot units; that of the training data's mean is "
            f"{validation['baseline_l1']:.4g}."
        )
    rows = [
        (title(found), condition.label, condition.trials, told_headline(condition))
        for found in results
        for condition in conditions(found)
    ]
    if rows:
        yield "Closed loop, by `xr0 eval`:"
        yield _table(("what", "how", "trials", "result"), rows)
    told = _told_fidelity(made.folder)
    if told:
        yield told
    if not (validation or rows or told):
        yield "None is told."


def _told_fidelity(folder: Path) -> str:
    found = fidelity(folder)
    if found is None:
        return ""
    moments, mean, worst = found
    return (
        f"Against the same checkpoint in 16 bits, on {moments} recorded moments: cosine of the chunks {mean:.6f} in "
        f"the mean, {worst:.6f} at worst (`{FIDELITY_FILES[0]}` has the rest)."
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
