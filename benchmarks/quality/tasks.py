"""Owns what the bench measures on: a teacher, its training windows, and held-out windows that never overlap them.

Refuses to know any method. Four small tasks: three real models of the shared data (skipped without it) and the demo's
own teacher. A small task keeps the teacher's log-probabilities of all training windows on disk (float16, once per
task): every method trains against the same numbers, and no step pays for the teacher's forward pass.

Three large tasks, on a GPU where there is one: teachers trained from scratch on WikiText-2 and three novels
(teachers.py), students on WikiText-2. Their teacher runs in each step: vocabulary times tokens is too much to keep.

Held-out documents are halved: sweeps choose by `validation`, tables report `test`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.quality.teachers import TEACHERS, LargerRecipe, teacher_folder
from benchmarks.record import shared_data
from jobs.demo.corpus import documents as python_docs
from jobs.split import is_held_out
from kbop_core.checkpoint import WEIGHTS_FILE, load_student, save_student, sha256
from kbop_core.convert import ConversionPlan, convert_plain, plan_conversion
from kbop_core.distill import teacher_logits
from kbop_core.documents import read_documents
from kbop_core.hf import load_model, load_tokenizer
from kbop_core.init.blockwise import BlockEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.text import WindowOrder, Windows, evaluation_windows, training_windows

#: Tokens in a training or evaluation window, and weights of a row that share a scale.
CONTEXT, GROUP = 128, 64
#: Most windows in each half of the held-out text.
HELD_OUT = 400
#: Tokens that calibrated methods see.
CALIBRATION_TOKENS = 65_536
#: Windows in one batch of them: one step of block-wise reconstruction.
CALIBRATION_BATCH = 8
#: Version of BNN Init and of block-wise reconstruction: students kept on disk and runs from them count for it alone.
INIT = 3
#: Characters of a held-out passage that must not occur in the training text.
PASSAGE = 64
ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".kbop" / "bench-quality"
WIKITEXT = Path("text", "wikitext-2")
#: Where an article of WikiText-2 begins.
ARTICLE = re.compile(r"(?m)^(?= = [^=\n]+ = \n \n)")

#: Documents for training, validation, test.
Split = tuple[list[str], list[str], list[str]]


def _stories(folder: Path) -> Split:
    texts = [" ".join(t.split()) for t in read_documents(folder / "text" / "tinystories" / "tinystories_v2_A.jsonl")]
    held = texts[-300:]
    seen = {t[:PASSAGE] for t in held}
    return [t for t in texts[:-300] if t[:PASSAGE] not in seen], held[:150], held[150:]


def _shakespeare(folder: Path) -> Split:
    text = read_documents(folder / "text" / "shakespeare" / "tiny_shakespeare.txt")[0]
    first, second = int(len(text) * 0.9), int(len(text) * 0.95)
    return [text[:first]], [text[first:second]], [text[second:]]


def _python_docs(_: Path) -> Split:
    texts = [d.text for d in python_docs()]
    held = [is_held_out(t) for t in texts]  # the teacher was trained on the others
    inside = [t for t, h in zip(texts, held, strict=True) if not h]
    outside = [t for t, h in zip(texts, held, strict=True) if h]
    return inside, outside[::2], outside[1::2]


def _wikitext(folder: Path) -> Split:
    train, validation, test = (
        [article for article in ARTICLE.split(read_documents(folder / WIKITEXT / f"{part}.txt")[0]) if article.strip()]
        for part in ("train", "valid", "test")
    )
    return train, validation, test


def _novels(folder: Path) -> list[str]:
    return [text for path in sorted((folder / "text" / "gutenberg").glob("*.txt")) for text in read_documents(path)]


def _nothing(_: Path) -> list[str]:
    return []


@dataclass(frozen=True)
class Source:
    """Where a task's teacher and text come from.

    Attributes:
        model: the teacher's folder in the shared data; "": the demo's, or the recipe's.
        split: shared data → documents.
        text: name of the text.
        recipe: of a larger teacher, trained on the training documents and `more`; None: a small task.
        more: shared data → documents that only the recipe's teacher reads.
    """

    model: str
    split: Callable[[Path], Split]
    text: str
    recipe: LargerRecipe | None = None
    more: Callable[[Path], list[str]] = _nothing


SOURCES = {
    "stories260K": Source("models/stories260K-hf", _stories, "TinyStories A"),
    "babyllama105": Source("models/babyllama105-hf", _stories, "TinyStories A"),
    "shakespeare-opt": Source("models/shakespeare-char-opt-hf", _shakespeare, "tiny Shakespeare"),
    "demo": Source("", _python_docs, "Python documentation"),
} | {recipe.name: Source("", _wikitext, "WikiText-2", recipe, _novels) for recipe in TEACHERS}


def available_tasks() -> list[str]:
    """Names of the tasks whose files are here, the large ones only with a GPU; without the shared data, the demo's."""
    folder = shared_data()
    if not folder:
        return ["demo"]
    large = torch.cuda.is_available() and (folder / WIKITEXT).is_dir()
    return [name for name, source in SOURCES.items() if large or not source.recipe]


def check_disjoint(train: Sequence[str], held: Sequence[str]) -> None:
    """Refuse held-out text that training reads: no passage of PASSAGE characters at its quarters may occur there.

    Raises:
        ValueError: with the passage.
    """
    if shared := _shared_passages(train, held):
        raise ValueError(f"held-out text occurs in the training text: {shared[0]!r}; drop one of the two")


def _shared_passages(train: Sequence[str], held: Sequence[str]) -> list[str]:
    whole = "\n".join(train)
    probes = [t[s : s + PASSAGE] for t in held for s in range(0, max(1, len(t) - PASSAGE), max(1, len(t) // 4))]
    return [p for p in probes if len(p) == PASSAGE and p in whole]


class Task:
    """One teacher with its text.

    Attributes:
        name: key of SOURCES.
        device: where teacher, students and training windows are: a GPU for large tasks where there is one.
        train_NT: training windows, int64 (N, CONTEXT).
        validation, test: held-out windows, on the CPU.
        teacher: in eval mode, without gradients.
        plan: what becomes binary, the same for all methods.
    """

    def __init__(self, name: str, group: int = GROUP) -> None:
        source, folder = SOURCES[name], shared_data() or Path()
        self.name, self.large = name, source.recipe is not None
        self.device = torch.device("cuda" if self.large and torch.cuda.is_available() else "cpu")
        train, validation, test = source.split(folder)
        train = _without_shared_passages(train, validation + test)
        more = _without_shared_passages(source.more(folder), validation + test)
        check_disjoint(train + more, validation + test)
        if source.recipe:
            where = teacher_folder(source.recipe, train + more, validation, CACHE / "teachers", self.device)
        else:
            where = folder / source.model if source.model else ROOT / "jobs" / "demo" / "teacher"
        self.model = str(where)
        tokenize = load_tokenizer(self.model).encode
        self.train_NT = training_windows(train, tokenize, CONTEXT, source.text).to(self.device)
        self.validation, self.test = (
            _first(evaluation_windows(texts, tokenize, CONTEXT, source.text)) for texts in (validation, test)
        )
        self.teacher = load_model(self.model).to(self.device)
        self.plan: ConversionPlan = plan_conversion(self.teacher, group)

    def fresh_model(self) -> nn.Module:
        """Another copy of the teacher."""
        model: nn.Module = load_model(self.model).to(self.device)
        return model

    def untrained_model(self, seed: int) -> nn.Module:
        """A model of the teacher's shape with random weights, as its class draws them."""
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(self.teacher.config, dtype=torch.float32).to(self.device)
        return model.eval()

    @cached_property
    def _ids(self) -> str:
        """Digest of the training windows, and of a larger teacher's weights: what is kept on disk is kept for these."""
        digest = hashlib.sha256(self.train_NT.cpu().numpy().tobytes())
        if self.large:  # it may have been trained again
            digest.update(sha256(Path(self.model) / WEIGHTS_FILE).encode())
        return digest.hexdigest()[:12]

    @cached_property
    def _stored_log_probs(self) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Teacher's log-probabilities, float16 (N, CONTEXT, V), from disk."""
        path = CACHE / f"{self.name}-{self._ids}.npy"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            shape = (*self.train_NT.shape, self.teacher.config.vocab_size)
            whole = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
            for start in range(0, len(whole), 32):
                log_p = teacher_logits(self.teacher, self.train_NT[start : start + 32]).log_softmax(-1)
                whole[start : start + 32] = log_p.clamp_min(-30.0).half().numpy()
            whole.flush()
            part.rename(path)
        found: np.ndarray[Any, np.dtype[np.float16]] = np.load(path, mmap_mode="r")
        return found

    def log_probs(self, rows: Sequence[int]) -> Tensor:
        """Teacher's log-probabilities of some windows, float32 (windows, CONTEXT, V), on the task's device."""
        if self.large:
            return teacher_logits(self.teacher, self.train_NT[list(rows)]).log_softmax(-1)
        return torch.from_numpy(self._stored_log_probs[list(rows)]).float()

    def calibration(self, seed: int) -> list[Tensor]:
        """Windows for calibrated methods, in batches."""
        rows = list(WindowOrder(len(self.train_NT), seed).indices(0, CALIBRATION_TOKENS // CONTEXT))
        return list(self.train_NT[rows].split(CALIBRATION_BATCH))

    def initialised(self, seed: int, effort: InitEffort) -> nn.Module:
        """A binary student fitted layer by layer (BNN Init, or a baseline's fit) and, if asked, block by block."""
        student = self.fresh_model()
        pretrained_init(student, self.teacher, self.plan, self.calibration(seed), effort)
        return student

    def started(self, seed: int, blockwise: BlockEffort | None) -> nn.Module:
        """BNN Init, block-wise reconstructed or not, kept on disk."""
        steps = blockwise.steps if blockwise else 0
        path = CACHE / f"{self.name}-{self._ids}-g{self.plan.group_size}-init{INIT}-{steps}-{seed}.safetensors"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{os.getpid()}-{path.name}")
            save_student(self.initialised(seed, InitEffort(blockwise=blockwise)), part)
            part.rename(path)
        student = self.fresh_model()
        convert_plain(student, self.plan, trainable=True)
        load_student(student, path)
        return student


def _first(windows: Windows) -> Windows:
    """At most HELD_OUT windows."""
    protocol = f"{windows.protocol}; the first {HELD_OUT} windows at most"
    return Windows(windows.ids_NT[:HELD_OUT], windows.lengths_N[:HELD_OUT], protocol)


def _without_shared_passages(train: list[str], held: list[str]) -> list[str]:
    """Training documents that share no probed passage with the held-out ones (single documents are cut instead)."""
    if len(train) == 1:
        return train
    present = _shared_passages(train, held)
    return [t for t in train if not any(p in t for p in present)]


@lru_cache(maxsize=4)
def task(name: str, group: int = GROUP) -> Task:
    """The task of that name, loaded once per process."""
    return Task(name, group)
