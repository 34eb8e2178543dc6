"""What the page says: what the dial predicts, and the numbers of a run. HTML."""

import html
from collections.abc import Sequence

import numpy as np

from scaling_perception.demo import dial
from scaling_perception.demo.session import Run, Session
from scaling_perception.inference.settings import Settings


def counted(number: int, word: str) -> str:
    """``1 step``, ``5 steps``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def compute(settings: Settings) -> str:
    """``5 steps × 2 members``."""
    most = "at most " if settings.adaptive else ""
    return f"{most}{counted(settings.steps, 'step')} × {counted(settings.ensemble, 'member')}"


def promise(session: Session, task: str, settings: Settings, stops: Sequence[dial.Stop]) -> str:
    """What the chosen compute is expected to give and to cost, before the run."""
    stop = dial.stop_of(session.table, task, settings)
    lines = []
    if stop is not None:
        low, high = stop.interval
        metric = html.escape(dial.metric_name(task))
        lines.append(
            f'<p class="big"><span class="label">Predicted error</span> {metric} <b>{stop.choice.error:.3g}</b> '
            f'<span class="soft">95 % interval {low:.3g} to {high:.3g}</span></p>'
        )
    elif stops:
        lines.append(
            '<p class="big"><span class="label">Predicted error</span> <b>unknown</b> <span class="soft">the model\'s '
            "table was not measured with these settings</span></p>"
        )
    else:
        lines.append(
            '<p class="big"><span class="label">Predicted error</span> <b>unknown</b> <span class="soft">this model '
            f"ships no table of budgets for {html.escape(task)}: choose steps and members yourself, or make a table "
            "with <code>evaluate --write-budgets</code></span></p>"
        )
    macs = session.predictor.macs(task, 1, 1) * session.predictor.evaluations(settings) * settings.ensemble
    work = "" if np.isnan(macs) else f" · {macs / 1e9:.3g} GMACs"
    lines.append(f'<p class="cost"><b>{compute(settings)}</b>{work} · {_seconds(session, task, settings)}</p>')
    if stops and session.table is not None:
        entry = session.table["tasks"][task]
        lines.append(dial.curve(stops, stop, task))
        trivial = entry.get("trivial")
        beside = f"; the strongest answer without the picture has {trivial['error']:.3g}" if trivial else ""
        best = next((one for one in stops if "best" in one.names), None)
        enough = ""
        if stop is not None and best is not None and stop.choice.compute > best.choice.compute:
            enough = f" {compute_of(best)} cannot be told apart from the lowest error: more compute buys little here."
        elif stop is not None and best is not None and stop.choice == best.choice:
            enough = " This is the cheapest setting that cannot be told apart from the lowest error."
        lines.append(
            f'<p class="soft">From the model\'s own table: the mean over {entry.get("images", "?")} images of '
            f"{html.escape(str(entry.get('dataset', '?')))}, which your picture need not resemble{beside}.{enough}</p>"
        )
    return f'<div class="promise" role="status">{"".join(lines)}</div>'


def compute_of(stop: dial.Stop) -> str:
    return f"{counted(stop.choice.steps, 'step')} × {counted(stop.choice.ensemble, 'member')}"


def _seconds(session: Session, task: str, settings: Settings) -> str:
    known = session.seconds(task, settings)
    if known is None:
        return '<span class="soft">time on this machine: not measured yet</span>'
    seconds, how = known
    most = "at most " if settings.adaptive else ""
    return f'<b>{most}{dial.amount(seconds)}</b> <span class="soft">on this machine ({how})</span>'


def numbers(run: Run, session: Session) -> str:
    """The numbers of a run, or of what there is of it."""
    assert run.estimate is not None
    if not run.done:
        share, made = run.members / run.settings.ensemble, f"{run.members} of {run.settings.ensemble} members"
        if run.settings.step_tolerance is not None:  # all of them, after the steps so far
            made += ", taking steps"
        return (
            '<div class="numbers" role="status"><p class="big">'
            f"<b>{made}</b> "
            f'<span class="soft">{dial.amount(run.seconds)}</span></p>'
            f'<progress value="{share:.3f}" max="1" aria-label="members"></progress></div>'
        )
    height, width = run.estimate.size
    cells = [
        ("Size", f"{width} × {height}"),
        ("Compute", compute(run.settings)),
        ("Time", dial.amount(run.seconds)),
    ]
    if run.compiled > 0.05:
        cells.append(("Compiling, once", dial.amount(run.compiled)))
    if not np.isnan(run.macs):
        cells.append(("GMACs", f"{run.macs / 1e9:.3g}"))
    if run.members > 1:
        spread = run.estimate.uncertainty
        cells.append(("Uncertainty, mean", f"{float(np.mean(spread)):.3g}"))
        cells.append(("largest", f"{float(np.max(spread)):.3g}"))
    stop = dial.stop_of(session.table, run.task, run.settings)
    if stop is not None:
        low, high = stop.interval
        cells.append((f"Predicted {dial.metric_name(run.task)}", f"{stop.choice.error:.3g} ({low:.3g}–{high:.3g})"))
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in cells)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in run.notes)
    return f'<div class="numbers" role="status"><dl>{rows}</dl>{notes}</div>'


def header(session: Session) -> str:
    """The page's first lines: what it is, which model."""
    config, tasks = session.predictor.config, list(session.tasks)
    millions = sum(int(np.prod(leaf.shape)) for leaf in _leaves(session.predictor.params)) / 1e6
    listed = ", ".join(tasks[:-1]) + (" and " if len(tasks) > 1 else "") + tasks[-1]
    return (
        '<header class="head"><h1>scaling-perception</h1>'
        f"<p>{html.escape(listed).capitalize()} by a diffusion model. Choose the compute: the page shows beforehand "
        "which error it buys.</p>"
        f'<p class="soft">Model <b>{html.escape(session.model)}</b> · {millions:.3g} M parameters · '
        f"{config.depth} layers · works at {session.predictor.resolution} × {session.predictor.resolution} pixels</p>"
        "</header>"
    )


def _leaves(tree: object) -> list:
    import jax

    return jax.tree.leaves(tree)
