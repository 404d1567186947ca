"""What ranks do with the collectives, the optimizer, the measurement and the init; no DeepSpeed engine here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import make_llama, make_windows
from torch import Tensor

from kbop_core.convert import binary_layers, plan_conversion
from kbop_core.documents import rows_of
from kbop_core.errors import KbopError
from kbop_core.evidence import EvidenceKind
from kbop_core.init.blockwise import BlockEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.perplexity import evaluate
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.slices import SliceReader, write_slices
from kbop_core.text import Windows
from kbop_core.token_files import PART_ROWS, Recipe, tokenise

STEPS = 5
#: Fewer rows than three ranks, a ragged number of them, and a multiple; no width is a multiple of another.
SHAPES = {"two rows": (2, 9), "ragged": (5, 33), "wide": (16, 128)}


def collectives(gang: Gang, folder: Path) -> dict[str, Any]:
    """Sums rows × (rank+1) to their owners and gathers them again, for many numbers of rows."""
    totals, columns = [0, 1, 2, 3, 5, 7, 64], 9
    wholes = [torch.arange(t * columns).view(t, columns).float() for t in totals]
    exact = replace(gang, wire=torch.float32)
    own = [exact.reduce_scatter_rows(whole * (gang.rank + 1))() for whole in wholes]
    rough = gang.reduce_scatter_rows(torch.full((4, 2), 1 + 2.0**-10) * 2.0**gang.rank)()
    flags = torch.tensor([gang.rank, -gang.rank])
    return {
        "wholes": wholes,
        "own_rows": [len(part) for part in own],
        "rough": rough,
        "gathered": gang.gather_rows(own, totals),
        "bytes": gang.gather_rows([part.byte() for part in own], totals),
        "all": gang.all_gather(torch.full((2, 3), float(gang.rank))),
        "none": gang.all_gather(torch.empty(0, 3)),
        "sum": gang.sum(flags.clone()),
        "max": gang.max(flags.clone()),
    }


def make_layers() -> dict[str, BinaryLinear]:
    layers = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        layers[name] = BinaryLinear(columns, rows, False, 8, trainable=True)
        layers[name].set_signs(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return layers


def gradient(name: str, step: int, sample: int, most: int) -> Tensor:
    """Whole numbers −most … most, the same wherever they are drawn."""
    seed = torch.Generator().manual_seed(1000 * step + 10 * sample + list(SHAPES).index(name))
    return torch.randint(-most, most + 1, SHAPES[name], generator=seed).float()


def run_steps(
    kbop: KBOP, layers: dict[str, BinaryLinear], give: Any, steps: Iterable[int] = range(STEPS)
) -> dict[str, Any]:
    bits, flips = [], []
    for step in steps:
        for name, layer in layers.items():
            assert layer.gradient_sink is not None
            layer.gradient_sink(give(name, step))
        flips.append(dict(kbop.step().flips))
        bits.append({name: layer.weight.clone() for name, layer in layers.items()})
    return {"bits": bits, "flips": flips}


def exact_flips(gang: Gang, folder: Path, in_flight: int = 2, kind: EvidenceKind = "bfloat16") -> dict[str, Any]:
    """Two samples: one rank sees their mean, of two ranks each sees one."""

    def give(name: str, step: int) -> Tensor:
        samples = [gradient(name, step, sample, 1000) for sample in range(2)]
        return (samples[0] + samples[1]) / 2 if gang.size == 1 else samples[gang.rank]

    layers, gang = make_layers(), replace(gang, wire=torch.float32)  # whole numbers beyond bfloat16's 8 bits
    schedule = FlipSchedule(0.1, STEPS, 1)
    kbop = KBOP(layers, schedule, momentum=0.98, gang=gang, evidence=kind, in_flight=in_flight)
    return run_steps(kbop, layers, give)


def exact_int8_flips(gang: Gang, folder: Path) -> dict[str, Any]:
    """The same with evidence in one byte: its blocks lie within rows, so that no shard cuts one."""
    return exact_flips(gang, folder, kind="int8")


def overlap(gang: Gang, folder: Path) -> list[dict[str, Any]]:
    """The same with none, one and all reduce-scatters under way at a time."""
    return [exact_flips(gang, folder, in_flight) for in_flight in (0, 1, 99)]


def small_layers(gang: Gang, folder: Path) -> dict[str, Any]:
    """All ranks see one gradient of few bits: bfloat16 holds its average exactly, whatever the number of ranks."""
    layers = make_layers()
    kbop = KBOP(layers, FlipSchedule(0.2, STEPS, 1), momentum=0.5, gang=gang)
    result = run_steps(kbop, layers, lambda name, step: gradient(name, step, 0, 3))
    held = {
        name: {
            "evidence": s.evidence.values(),
            "row": s.moments.row,
            "column": s.moments.column,
            "seen": s.reversals.start,
        }
        for name, s in kbop.shards.items()
    }
    return result | {"state_bytes": kbop.state_bytes(), "held": held}


def coarse_flips(gang: Gang, folder: Path) -> dict[str, Any]:
    """Gradients that bfloat16 holds exactly, while sums of a column of them it does not; as production sends them."""
    layers = make_layers()
    kbop = KBOP(layers, FlipSchedule(0.1, STEPS, 1), momentum=0.5, gang=gang)
    result = run_steps(kbop, layers, lambda name, step: gradient(name, step, 0, 100))
    return result | {"columns": {name: s.moments.column for name, s in kbop.shards.items()}}


def moved_flips(gang: Gang, folder: Path) -> dict[str, Any]:
    """The same steps, two by two ranks, two by one, the last by three: each takes up the state the others left."""
    before, steps = {2: (None, range(2)), 1: (2, range(2, 4)), 3: (1, range(4, 5))}[gang.size]
    layers = make_layers()
    kbop = KBOP(layers, FlipSchedule(0.2, STEPS, 1), momentum=0.5, gang=gang)
    if before is not None:
        kbop.load(SliceReader(sorted(folder.parent.glob(f"flips-{before}-*"))), steps.start, 0.5 ** (steps.start + 1))
    result = run_steps(kbop, layers, lambda name, step: gradient(name, step, 0, 3), steps)
    write_slices(kbop.state(), folder.parent / f"flips-{gang.size}-{gang.rank}")
    return result | {"unit": kbop.unit}


def _broken(gang: Gang, give: Any) -> dict[str, Any]:
    layers = make_layers()
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    kbop = KBOP(layers, FlipSchedule(0.5, STEPS, 1), gang=gang)
    try:
        run_steps(kbop, layers, give)
    except KbopError as error:
        same = all(torch.equal(before[name], layer.weight) for name, layer in layers.items())
        return {"error": type(error).__name__, "message": str(error), "unchanged": same}
    return {"error": None}


def nan_gradient(gang: Gang, folder: Path) -> dict[str, Any]:
    """Rank 1 alone sees a NaN, in a row that rank 0 owns."""

    def give(name: str, step: int) -> Tensor:
        value = gradient(name, step, gang.rank, 100)
        if gang.rank == 1 and name == "ragged":
            value[0, 5] = torch.nan
        return value

    return _broken(gang, give)


def missing_gradient(gang: Gang, folder: Path) -> dict[str, Any]:
    """Every rank misses the gradient of one layer: the contract fails on all before any collective."""
    layers = make_layers()
    kbop = KBOP(layers, FlipSchedule(0.5, STEPS, 1), gang=gang)
    for name in ("two rows", "wide"):
        sink = layers[name].gradient_sink
        assert sink is not None
        sink(gradient(name, 0, gang.rank, 100))
    try:
        kbop.step()
    except KbopError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def quality(gang: Gang, folder: Path) -> list[Any]:
    """Ragged windows, and fewer windows than ranks."""
    model, teacher = make_llama(0), make_llama(1)
    ids = make_windows(7, 16)
    lengths = torch.tensor([16, 3, 9, 16, 2, 5, 16])
    many, one = Windows(ids, lengths, "ragged"), Windows(ids[:1], lengths[:1], "one")
    return [evaluate(model, windows, 2, teacher, gang) for windows in (many, one)]


def init(gang: Gang, folder: Path) -> dict[str, Any]:
    """Six calibration windows, dealt to the ranks; four key rows, so that of three ranks one owns none."""
    model, teacher, windows = make_llama(0), make_llama(0), make_windows(6, 16)
    plan = plan_conversion(model, 4)
    pretrained_init(model, teacher, plan, [windows[gang.rank :: gang.size]], gang=gang)
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    layers = binary_layers(model)
    return {
        "logits": logits,
        "dense": make_llama(0)(input_ids=windows).logits.detach(),
        "bits": {name: layer.weight for name, layer in layers.items()},
        "scales": {name: layer.weight_scale.detach() for name, layer in layers.items()},
    }


def blockwise(gang: Gang, folder: Path) -> dict[str, Any]:
    """Each rank reconstructs on windows of its own; one rank reads what two read, in one batch, and half of it."""
    windows = make_windows(4, 16)
    halves = {"half": windows[::2]} if gang.size == 1 else {}
    return {
        name: _reconstructed(gang, ids) for name, ids in ({"all": windows[gang.rank :: gang.size]} | halves).items()
    }


def _reconstructed(gang: Gang, windows: Tensor) -> dict[str, Any]:
    model, teacher = make_llama(0), make_llama(0)
    effort = InitEffort(blockwise=BlockEffort(30))
    errors = pretrained_init(model, teacher, plan_conversion(model, 4), [windows], effort, gang)
    return {
        "errors": errors,
        "bits": {name: layer.weight for name, layer in binary_layers(model).items()},
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


def token_files(gang: Gang, folder: Path) -> dict[str, bytes]:
    """The ranks make a source's token files together: two whole parts and some rows, read until they are enough."""
    texts, found = rows_of("texts", [chr(97 + n % 26) * (n % 9) for n in range(2 * PART_ROWS + 9)]), {}
    recipe = Recipe(lambda text: list(map(ord, text)), 128, lambda text: True, lambda text: None, "tests")
    for name, enough in (("all", 10**9), ("some", 3000)):
        target = folder / f"tokens-{name}"
        target.mkdir(exist_ok=True)
        tokenise(texts, recipe, target, enough, gang, torch.device("cpu"))
        found |= {f"{name}/{path.name}": path.read_bytes() for path in target.iterdir()}
        gang.all_gather(torch.zeros(1))  # nobody goes on while another still looks
    return found


SCENARIOS = {
    f.__name__: f
    for f in (
        collectives,
        exact_flips,
        exact_int8_flips,
        overlap,
        small_layers,
        coarse_flips,
        moved_flips,
        nan_gradient,
        missing_gradient,
        quality,
        init,
        blockwise,
        token_files,
    )
}
