"""Owns how finished runs become tables, claims, plots and the generated part of docs/quality.md. Runs nothing.

Gap closed against a peer: (ln ppl_peer − ln ppl_ours) / (ln ppl_peer − ln ppl_teacher), on the test half, same task and
tokens, the peer with its best rate. Runs that are missing leave their rows out; nothing is filled in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality import plots, store, suites
from benchmarks.quality.tasks import ROOT, SOURCES
from benchmarks.quality.training import RunConfig
from benchmarks.record import Claim, claim, fill, markdown, publish
from jobs.spec import RECIPES

DOCUMENTS = (ROOT / "docs" / "quality.md", ROOT / "README.md")
BUDGETS = {"short": suites.SHORT, "medium": suites.MEDIUM, "long": suites.LONG}
#: Gap to close, averaged over tasks: the paper's own headline at the medium budget, less at the short one.
BARS = {"short": 0.20, "medium": 0.3683, "long": 0.3683}

#: The models that claims are about; larger teachers have rows.
_SMALL = [name for name, source in SOURCES.items() if source.recipe is None]

Row = dict[str, Any]
Result = dict[str, Any]


class Results:
    """Finished runs, looked up by what a table asks for."""

    def __init__(self, done: dict[str, Result]) -> None:
        self.done = done

    def seeds(self, task: str, method: str, tokens: int) -> list[tuple[RunConfig, Result]]:
        """Runs of a method with the best rate that ran at this budget, one per seed, seed 0 first."""
        if method in suites.CALIBRATED:
            chosen: RunConfig | None = RunConfig(task, method)
        else:
            chosen = suites.best(task, method, self.done, tokens)
        if chosen is None:
            return []
        runs = [replace(chosen, seed=seed) for seed in suites.SEEDS]
        stored = [(c, self.done[store.key(c)]) for c in runs if store.key(c) in self.done]
        return [(c, r) for c, r in stored if "diverged" not in r]

    def perplexity(self, task: str, method: str, tokens: int, seeds: Sequence[int] = suites.SEEDS) -> float | None:
        """Geometric mean of the test perplexities over those of the seeds that ran."""
        values = [r["test"] for c, r in self.seeds(task, method, tokens) if c.seed in seeds]
        return math.exp(statistics.fmean(map(math.log, values))) if values else None

    def kl(self, task: str, method: str, tokens: int, seeds: Sequence[int] = suites.SEEDS) -> float | None:
        """Mean over the same of KL(teacher ‖ student) on the test half, nats per token."""
        values = [r["kl"] for c, r in self.seeds(task, method, tokens) if c.seed in seeds]
        return statistics.fmean(values) if values else None

    def start_seconds(self, task: str) -> float:
        """What making the start of ours took: BNN Init and block-wise reconstruction; 0 when `quick` has not run."""
        return next((r["preparation_seconds"] for _, r in self.seeds(task, "quick", 0)), 0.0)

    def teacher(self, task: str) -> float | None:
        """Test perplexity of the teacher, as the run of `plain` measured it."""
        return next((r["teacher"] for _, r in self.seeds(task, "plain", 0)), None)

    def common_seeds(self, task: str, peer: str, tokens: int) -> list[int]:
        """Seeds that ran for ours and for the peer."""
        ours, theirs = ({c.seed for c, _ in self.seeds(task, m, tokens)} for m in ("kbop", peer))
        return sorted(ours & theirs)

    def gap_closed(self, task: str, peer: str, tokens: int) -> float | None:
        """By ours, over the seeds that both ran, see the module's head; None while a run is missing, and where the peer
        is not behind the teacher.
        """
        seeds = self.common_seeds(task, peer, tokens)
        best = self.teacher(task)
        if not seeds or best is None:
            return None
        logs = [self.mean_log(task, method, tokens, seeds) for method in (peer, "kbop")]
        open_nats = logs[0] - math.log(best)
        return (logs[0] - logs[1]) / open_nats if open_nats > 0 else None

    def mean_log(self, task: str, method: str, tokens: int, seeds: Sequence[int]) -> float:
        """Mean logarithm of the test perplexity over these seeds, nats."""
        return statistics.fmean(math.log(r["test"]) for c, r in self.seeds(task, method, tokens) if c.seed in seeds)

    def fair_peers(self, task: str, tokens: int) -> list[str]:
        """The latent-weight peers that ran and store no more bits than ours (and 5 %)."""
        ours = self.seeds(task, "kbop", tokens)
        runs = {peer: found for peer in suites.PEERS if (found := self.seeds(task, peer, tokens))}
        return [p for p, found in runs.items() if ours and found[0][1]["bits"] <= 1.05 * ours[0][1]["bits"]]

    def best_peer(self, task: str, tokens: int, but: str = "") -> str | None:
        """The fair peer of lowest test perplexity, the hardest to beat, leaving one out if told."""
        found = [peer for peer in self.fair_peers(task, tokens) if peer != but]
        return min(found, key=lambda peer: self.perplexity(task, peer, tokens) or math.inf, default=None)


def write() -> None:
    """Tables on the screen, results/quality.json, plots, docs/quality.md and README's table."""
    results = Results(store.finished())
    rows = list(_rows(results))
    publish("quality", "make bench-quality", [_flat(r) for r in rows], list(_claims(results)))
    sections = {
        "headline": _gaps(results),
        "methods": markdown(rows),
        "speed": markdown(list(_speed(results))),
        "efforts": markdown(list(_efforts(results))),
        "ablations": _ablations(results),
        "scratch": markdown(list(_scratch(results))),
    }
    for task in SOURCES:
        curves = {m: r["curve"] for m in ("kbop", *suites.PEERS) for r in _longest(results, task, m)}
        if curves:
            plots.learning_curves(task, curves, results.teacher(task))
    flips = {task: r for task in SOURCES for r in _longest(results, task, "kbop")}
    if flips:
        plots.flips(flips)
    for document in DOCUMENTS:
        fill(document, sections, "make bench-quality")


def _longest(results: Results, task: str, method: str) -> list[Result]:
    for tokens in sorted(BUDGETS.values(), reverse=True):
        found = results.seeds(task, method, tokens)
        if found:
            return [found[0][1]]
    return []


def _rows(results: Results) -> Iterator[Row]:
    for budget, tokens in BUDGETS.items():
        for task in SOURCES:
            for method in (*suites.CALIBRATED, *suites.SWEEPS):
                if method in suites.CALIBRATED and budget != "short":
                    continue
                runs = results.seeds(task, method, tokens)
                if runs:
                    yield _row(results, budget, task, method, runs)


def _row(results: Results, budget: str, task: str, method: str, runs: Sequence[tuple[RunConfig, Result]]) -> Row:
    config, first = runs[0]
    values = [r["test"] for _, r in runs]
    gap = results.gap_closed(task, method, BUDGETS[budget])
    return {
        "model": task,
        "method": method,
        "tokens": config.tokens,
        "rate": config.lr,
        "perplexity": statistics.fmean(values),
        "±": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "teacher": results.teacher(task),
        "KL": first["kl"],
        "top-1": first["top1"],
        "bits": first["bits"],
        "state bytes": first["state_bytes"],
        "seconds": first["seconds"] + first["preparation_seconds"],
        "gap closed by KBOP": None if method == "kbop" else gap,
    }


def _claims(results: Results) -> Iterator[Claim]:
    """Of each budget: the mean gap, the worst model, all together. A model whose peer is not behind its teacher leaves
    no gap: it is named, and counts in the other two.
    """
    for budget, tokens in BUDGETS.items():
        duels = _duels(results, tokens)
        gaps = {d.task: gap for d in duels if (gap := results.gap_closed(d.task, d.peer, tokens)) is not None}
        if not gaps:
            continue
        peers = {peer for d in duels for peer in results.fair_peers(d.task, tokens)}
        gapless = "".join(
            f"; {d.task} has no gap: its peer is not behind the teacher" for d in duels if d.task not in gaps
        )
        where = (
            f"{budget} budget, {len(duels)} of {len(_SMALL)} models, peers of equal bits: {', '.join(sorted(peers))}"
        )
        mean, bar = statistics.fmean(gaps.values()), f">= {BARS[budget]}"
        yield claim(f"gap closed, mean, {where}{gapless}", mean, "1", bar)
        yield claim(f"ahead of the best peer, worst model, {where}", min(d.closed for d in duels), "nat", ">= 0")
        together = sum(d.closed for d in duels) / sum(d.opened for d in duels)
        yield claim(f"gap closed, all models together, {where}", together, "1", bar)
    yield from _state_claims(results)


def _state_claims(results: Results) -> Iterator[Claim]:
    """Bytes between two steps, and what int8 evidence loses beside the float32 evidence of the laboratory's rule."""
    task, default = _ablation_home(results)
    base = results.done.get(store.key(default))
    for evidence, bars in (("bfloat16", (2.0,)), ("int8", (2.0, 1.2))):
        options = {} if evidence == "bfloat16" else {"evidence": evidence}
        found = results.done.get(store.key(replace(default, method="kbop", options=options)))
        if not found or not base or "diverged" in found:
            continue
        for most in bars:
            yield claim(
                f"state, {evidence} evidence, {task}", found["state_bytes"], "bytes/weight", f"<= {1 / 8 + most}"
            )
        loss = math.log(found["validation"]) - math.log(base["validation"])
        yield claim(f"loss by {evidence} evidence, {task}", loss, "nat", "<= 0.01")


@dataclass(frozen=True)
class _Duel:
    """Ours beside the best peer on one task, over the seeds that both ran.

    Attributes:
        closed: ln ppl_peer − ln ppl_ours, nats.
        opened: ln ppl_peer − ln ppl_teacher, nats; not positive where the peer is not behind the teacher.
    """

    task: str
    peer: str
    seeds: Sequence[int]
    closed: float
    opened: float


def _duels(results: Results, tokens: int, tasks: Sequence[str] = _SMALL) -> list[_Duel]:
    """Those of the tasks for which ours, a fair peer and the teacher's perplexity are there."""
    found = []
    for task in tasks:
        peer, best = results.best_peer(task, tokens), results.teacher(task)
        seeds = results.common_seeds(task, peer, tokens) if peer else []
        if peer and best and seeds:
            theirs, ours = (results.mean_log(task, method, tokens, seeds) for method in (peer, "kbop"))
            found.append(_Duel(task, peer, seeds, theirs - ours, theirs - math.log(best)))
    return found


def _gaps(results: Results) -> str:
    lines = []
    for budget, tokens in BUDGETS.items():
        for d in _duels(results, tokens, list(SOURCES)):
            gap = results.gap_closed(d.task, d.peer, tokens)
            ours, theirs = (results.kl(d.task, method, tokens, d.seeds) or 0.0 for method in ("kbop", d.peer))
            lines.append(
                {
                    "budget": f"{budget}, {tokens / 1e6:g} M tokens",
                    "model": d.task,
                    "teacher": results.teacher(d.task),
                    "best latent peer": f"{d.peer} {results.perplexity(d.task, d.peer, tokens, d.seeds):.4g}",
                    "KBOP": results.perplexity(d.task, "kbop", tokens, d.seeds),
                    "nats ahead": d.closed,
                    "gap closed": "peer is not behind the teacher" if gap is None else gap,
                    "KL, peer": theirs,
                    "KL, KBOP": ours,
                    "KL closed": 1.0 - ours / theirs,
                    "seeds": len(d.seeds),
                }
            )
    return markdown(lines)


def _speed(results: Results) -> Iterator[Row]:
    """How many tokens and seconds ours needs to reach what the best peer reaches at its end."""
    for budget, tokens in BUDGETS.items():
        for task in SOURCES:
            peer = results.best_peer(task, tokens)
            ours = results.seeds(task, "kbop", tokens)
            if peer is None or not ours:
                continue
            theirs = results.seeds(task, peer, tokens)[0][1]["curve"]
            reached = next((p for p in ours[0][1]["curve"] if p[2] <= theirs[-1][2]), None)
            yield {
                "budget": budget,
                "model": task,
                "peer": peer,
                "peer's validation perplexity": theirs[-1][2],
                "peer's tokens": theirs[-1][0],
                "peer's seconds": theirs[-1][1],
                "KBOP's tokens": reached[0] if reached else None,
                "KBOP's seconds, start included": reached[1] + results.start_seconds(task) if reached else None,
            }


def _efforts(results: Results) -> Iterator[Row]:
    """The effort levels of the job spec."""
    for task in SOURCES:
        for effort, config in suites.efforts([task]):
            found = results.done.get(store.key(config))
            if found is None or "diverged" in found:
                continue
            yield {
                "model": task,
                "effort": effort,
                "blockwise steps": RECIPES[effort].blockwise_steps,
                "tokens end to end": config.tokens,
                "teacher": results.teacher(task),
                "perplexity": found["test"],
                "KL": found["kl"],
                "top-1": found["top1"],
            }


def _ablation_home(results: Results) -> tuple[str, RunConfig]:
    """The task whose ablations have run, and its default row."""
    defaults = {task: next(suites.ablations(task))[2] for task in SOURCES}
    return next(((t, c) for t, c in defaults.items() if store.key(c) in results.done), next(iter(defaults.items())))


def _ablations(results: Results) -> str:
    task, default = _ablation_home(results)
    base = results.done.get(store.key(default))
    if base is None:
        return "Not run yet."
    tables: dict[str, list[Row]] = {}
    for table, name, config in suites.ablations(task):
        found = results.done.get(store.key(config))
        if found:
            difference = math.log(found["validation"]) - math.log(base["validation"])
            row = {
                "row": name,
                "bits": found.get("bits"),
                "validation": found["validation"],
                "test": found["test"],
                "nats to default": difference,
            }
            tables.setdefault(table, []).append(row)
    parts = [f"{task}, {default.tokens:,} tokens, seed 0; default: {base['validation']:.4g} / {base['test']:.4g}."]
    if peer := results.best_peer(task, suites.SHORT, but="ste_quick"):  # which has read the start's tokens too
        value = results.perplexity(task, peer, suites.SHORT)
        parts.append(
            f"The start read {suites.BLOCKWISE_TOKENS:,} tokens. Counted with these they are the short budget, with "
            f"which the best latent peer that starts without them, {peer}, reaches {value:.4g} on the test half."
        )
    return "\n\n".join(parts + [f"**{table}**\n\n{markdown(rows)}" for table, rows in tables.items()])


def _scratch(results: Results) -> Iterator[Row]:
    """Runs from random signs: how large signals are on their way through the blocks at the start, and convergence."""
    _, default = _ablation_home(results)
    for name, options in ({"pretrained signs, BNN Init": {"init": "bnn"}} | suites.SCRATCH).items():
        found = results.done.get(store.key(replace(default, options=options)))
        if found and "diverged" not in found:
            points = [found["curve"][i] for i in (0, len(found["curve"]) // 2 - 1, -1)]
            sizes = " → ".join(f"{s:.3g}" for s in found["hidden_sizes"])
            yield {"start": name, "root mean square of hidden states before each block": sizes} | {
                f"validation at {tokens:,} tokens": perplexity for tokens, _, perplexity in points
            }


def _flat(row: Row) -> Row:
    return {k: "" if v is None else v for k, v in row.items()}
