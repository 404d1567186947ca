"""Owns the promises of the demo's text, split and teacher: what they are, how large, and how good.

Refuses to train anything: the recipe itself is run by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import jobs
import jobs.demo
from jobs.demo.corpus import MIN_CHARACTERS, MIN_REPEATED_CHARACTERS, Document, clean, documents
from jobs.split import is_held_out

TEACHER = Path(jobs.demo.__file__).parent / "teacher"

#: Held-out perplexity of the first 8 windows in the text that the model card names, and the room above it.
FIRST_WINDOWS_PERPLEXITY, ROOM = 21.58, 1.10


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(documents())


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TEACHER)


def digest(corpus: list[Document]) -> str:
    return hashlib.sha256(b"".join(document.text.encode() + b"\0" for document in corpus)).hexdigest()


def test_another_interpreter_writes_the_same_text_and_imports_nothing_that_it_reads(corpus, tmp_path):
    out, root = tmp_path / "corpus.jsonl", Path(jobs.__file__).parents[1]
    script = (
        f"import sys\nfrom jobs.demo.corpus import main\nmain(['--out', {str(out)!r}])\n"
        "print({'torch', 'turtle', 'antigravity', 'this', 'ftplib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, check=True, cwd=root, env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.splitlines()[-1] == "set()"
    with out.open(encoding="utf-8") as lines:
        assert [Document(**json.loads(line)) for line in lines] == corpus


def test_the_corpus_holds_between_one_and_three_megabytes_of_sorted_unique_documents(corpus):
    titles = [document.title for document in corpus]
    assert 1e6 < sum(len(document.text.encode()) for document in corpus) < 3e6
    assert titles == sorted(set(titles))
    assert all(len(document.text) >= MIN_CHARACTERS for document in corpus)


def test_both_kinds_of_prose_are_there(corpus):
    texts = {document.title: document.text for document in corpus}
    assert texts["module textwrap"].startswith("Text wrapping and filling.")
    assert "break_long_words" in texts["module textwrap.TextWrapper"]
    assert any(title.startswith("topic") and text.startswith('The "try" statement') for title, text in texts.items())


def test_no_long_paragraph_is_in_two_documents(corpus):
    keys = [{" ".join(part.split()) for part in document.text.split("\n\n")} for document in corpus]
    long_keys = [key for of_one in keys for key in of_one if len(key) >= MIN_REPEATED_CHARACTERS]
    assert len(long_keys) == len(set(long_keys))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("one  two\r\n\r\n\r\n\r\nthree \t \r\n", "one two\n\nthree"),
        ("\n    Indented.\n\n        Example.\n    ", "Indented.\n\n    Example."),
        ("a\x00b\x1b[0m \ud800c", "ab[0m c"),
        ("naïve – text", "naïve – text"),
        (" \n\n ", ""),
        ("", ""),
    ],
)
def test_cleaning_leaves_words_one_space_apart_and_paragraphs_one_line(raw, expected):
    assert clean(raw) == expected
    assert clean(expected) == expected


def test_about_a_tenth_of_the_text_is_held_out_and_none_of_it_is_in_both_parts(corpus):
    held_out = [document.text for document in corpus if is_held_out(document.text)]
    train = [document.text for document in corpus if not is_held_out(document.text)]
    assert 0.05 < sum(map(len, held_out)) / sum(len(document.text) for document in corpus) < 0.15
    assert set(held_out).isdisjoint(train)


@pytest.mark.parametrize("text", ["", "one", "two", "naïve", "x" * 10_000])
def test_a_text_is_held_out_when_ten_divides_its_hash(text):
    first_8_bytes = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert is_held_out(text) is (int(first_8_bytes, 16) % 10 == 0)


def test_known_texts_keep_their_sides_forever():
    assert [n for n in range(60) if is_held_out(f"document {n}")] == [4, 11, 12, 19, 25, 44]


def test_the_tokenizer_gives_every_text_back(corpus, tokenizer):
    texts = [document.text for document in corpus[::20]] + ["", " a  b ", "\n\n\tx", "¿naïve? – 漢字 🙂", "<|x|>"]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in tokens[1:]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_shipped_folder_is_small_complete_and_has_no_code():
    names = {path.name for path in TEACHER.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 4_000_000
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == "float16"
    assert "auto_map" not in config


def test_the_model_card_gives_the_command_and_the_corpus():
    card = (TEACHER / "README.md").read_text(encoding="utf-8")
    assert "python -m jobs.demo.train_teacher" in card
    assert "held-out perplexity" in card
    assert "{" not in card


def test_every_binarized_layer_has_whole_groups_of_128_inputs():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TEACHER)
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(linear.in_features % 128 == 0 for linear in linears)
    assert model.num_parameters() <= 2_000_000
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_teacher_predicts_the_held_out_text_as_well_as_its_card_says(corpus, tokenizer):
    """Another Python version carries another text: there the bound is a loose one."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stream: list[int] = []
    for document in corpus:
        if is_held_out(document.text) and len(stream) < 8 * 256:
            stream += tokenizer(document.text)["input_ids"]
    batch_BT = torch.tensor(stream[: 8 * 256]).view(8, 256)
    model = transformers.AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = model(input_ids=batch_BT).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())
    same_text = digest(corpus) in (TEACHER / "README.md").read_text(encoding="utf-8")
    assert math.exp(nll) < FIRST_WINDOWS_PERPLEXITY * (ROOM if same_text else 2)
