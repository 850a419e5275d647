"""CLIP's byte-level BPE, with the context length of SAM3's text encoder."""

from __future__ import annotations

import importlib.util
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType

from torch import Tensor

CONTEXT_LENGTH = 32
PAD_ID = 0  # also the id of "!" inside a word: a quirk of CLIP that SAM3's padding mask inherits


class SimpleTokenizer:
    """Phrases -> token ids; vocabulary and merges are those of open_clip, read at the first use.

    Args:
        bpe_path: another vocabulary file in the format of CLIP's `bpe_simple_vocab_16e6.txt.gz`.
    """

    def __init__(self, bpe_path: str | Path | None = None, context_length: int = CONTEXT_LENGTH):
        if bpe_path is not None and not Path(bpe_path).is_file():
            raise FileNotFoundError(f"no BPE vocabulary at {bpe_path}; leave bpe_path out to use the packaged one")
        self.bpe_path = bpe_path
        self.context_length = context_length

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """One or more phrases -> ids (n, context_length) long: start, tokens, end, then zeros.

        Text is lower-cased, its white space collapsed. What does not fit is cut off, and the last id is still the end.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        strange = next((text for text in texts if not isinstance(text, str)), None)
        if strange is not None:
            raise ValueError(f"a text prompt must be a string, got {type(strange).__name__} {strange!r}")
        return self._clip(texts, context_length or self.context_length)

    @cached_property
    def _clip(self):
        module = _open_clip_tokenizer()
        return module.tokenize if self.bpe_path is None else module.SimpleTokenizer(str(self.bpe_path))


def _open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer file by itself: importing the package would load all of its models, which takes seconds."""
    name = "open_clip.tokenizer"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ValueError("text prompts need the CLIP vocabulary of open_clip; install it: pip install open_clip_torch")
    alias = "sam3.model._open_clip_tokenizer"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, Path(package.origin).with_name("tokenizer.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[alias] = module
    return sys.modules[alias]
