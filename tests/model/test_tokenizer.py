"""Token ids: layout, cleaning, truncation and the quirk about id 0."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sam3.model.tokenizer import SimpleTokenizer

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenize() -> SimpleTokenizer:
    return SimpleTokenizer()


def words(ids: torch.Tensor) -> list[int]:
    """What stands between start and end."""
    row = ids[0].tolist()
    assert row[0] == START
    return row[1 : row.index(END)]


def test_layout(tokenize):
    ids = tokenize(["visual", "yellow dog"])
    assert ids.shape == (2, 32) and ids.dtype == torch.long
    assert ids[1, [0, 3]].tolist() == [START, END]
    assert ids[1, 4:].tolist() == [0] * 28
    assert words(tokenize("dog")) == [1929]  # CLIP's id of "dog</w>"


def test_cleaning(tokenize):
    plain = words(tokenize("a red car"))
    assert len(plain) == 3
    for text in ("  A  RED\tcar\n", "a red&#32;car", "a red car"):
        assert words(tokenize(text)) == plain
    assert words(tokenize("2020")) == words(tokenize("2 0 2 0"))  # digits stand alone
    assert len(words(tokenize("it's"))) == 2


def test_empty_text_is_start_and_end(tokenize):
    assert tokenize("")[0, :3].tolist() == [START, END, 0]


def test_long_text_is_cut_and_still_ends(tokenize):
    ids = tokenize("dog " * 40)
    assert ids[0].tolist() == [START, *[1929] * 30, END]
    assert tokenize("dog " * 40, context_length=5)[0].tolist() == [START, 1929, 1929, 1929, END]


def test_exclamation_mark_inside_a_word_has_the_id_of_padding(tokenize):
    assert 0 in words(tokenize("#!$x"))


def test_refusals(tokenize):
    with pytest.raises(ValueError, match="must be a string, got int 3"):
        tokenize(["dog", 3])
    with pytest.raises(FileNotFoundError, match="no BPE vocabulary at nowhere"):
        SimpleTokenizer("nowhere.gz")


def test_same_ids_as_open_clip(tokenize):
    from open_clip.tokenizer import SimpleTokenizer as Reference
    from open_clip.tokenizer import default_bpe

    texts = ["a photo of a Zebra!!", "naïve café ☕", "don't 3.14", "<start_of_text> x", "été &amp; hiver", "狗"]
    assert torch.equal(tokenize(texts), Reference(context_length=32)(texts))
    assert torch.equal(SimpleTokenizer(default_bpe())(texts), tokenize(texts))


def test_models_of_open_clip_are_not_imported():
    code = (
        "import sys; from sam3.model.tokenizer import SimpleTokenizer; SimpleTokenizer()('a dog'); "
        "assert 'open_clip' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
