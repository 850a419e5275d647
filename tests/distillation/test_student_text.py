"""The student's text tower and tokenizer against open_clip's MobileCLIP-S1."""

from __future__ import annotations

import pytest
import torch

from distillation.models.efficient_sam3 import EfficientSAM3Config
from distillation.models.text import TextEncoder
from distillation.models.tokenizer import padding_of, tokenize
from tests.parity.fill import fill_

PHRASES = ["a photo of a cat", "", "Two  DOGS, one cat & a red-ish car!", "word " * 100]


def text_encoder() -> TextEncoder:
    c = EfficientSAM3Config.preset("full")
    return TextEncoder(c.dim, c.text_width, c.text_heads, c.text_layers, c.context_length, c.vocab_size)


def test_sizes_are_those_of_mobileclip_s1():
    import open_clip

    config, sizes = EfficientSAM3Config.preset("full"), open_clip.get_model_config("MobileCLIP-S1")["text_cfg"]
    assert sizes == {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "no_causal_mask": True,
    }


@torch.no_grad()
def test_the_whole_sequence_is_that_of_mobileclip_s1():
    import open_clip

    theirs = open_clip.create_model("MobileCLIP-S1", pretrained=None).text.eval()
    fill_(theirs.state_dict())
    ours = text_encoder().eval()
    weights = {key: value for key, value in theirs.state_dict().items() if key != "text_projection"}
    ours.tower.load_state_dict(weights, strict=True)
    sequences = []
    theirs.ln_final.register_forward_hook(lambda _module, _inputs, output: sequences.append(output))
    ids, _ = tokenize(PHRASES)
    pooled = theirs(ids)
    tokens = []
    ours.tower.ln_final.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    features = ours(ids)
    torch.testing.assert_close(tokens[0], sequences[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, ours.projection(sequences[0]), rtol=1e-5, atol=1e-5)
    # Their own pooling, applied to our sequence, gives their answer: rows are phrases, not places.
    ends = tokens[0][torch.arange(len(ids)), ids.argmax(dim=1)]
    torch.testing.assert_close(ends @ theirs.text_projection, pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_phrases_of_a_batch_do_not_mix_and_later_tokens_count():
    encoder = TextEncoder(16, 32, 2, 2, 77, 49408).eval()
    fill_(encoder.state_dict())
    ids, _ = tokenize(PHRASES)
    together = encoder(ids)
    for i in range(len(ids)):
        torch.testing.assert_close(together[i : i + 1], encoder(ids[i : i + 1]), rtol=1e-4, atol=1e-5)
    changed = ids[:1].clone()
    changed[0, 3] = 1000
    assert (encoder(changed)[0, 1] - together[0, 1]).abs().max() > 1e-4  # token 1 sees token 3: no causal mask


def test_ids_are_those_of_mobileclip_s1():
    import open_clip

    ids, padding = tokenize(PHRASES)
    assert torch.equal(ids, open_clip.get_tokenizer("MobileCLIP-S1")(PHRASES))
    assert ids.dtype == torch.long
    assert padding.dtype == torch.bool
    assert ids[0].tolist()[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 0]  # start, a, photo, of, a, cat, end
    assert (~padding).sum(dim=1).tolist()[:2] == [7, 2]
    assert ids[3, -1] == 49407  # what does not fit is cut off before the end token
    assert not padding[3].any()


def test_padding_begins_after_the_first_end():
    ids = torch.tensor([[49406, 7, 49407, 0, 49407, 0], [49406, 0, 5, 49407, 0, 0], [49406, 1, 2, 3, 4, 5]])
    assert padding_of(ids).int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="a text prompt must be a string, got int 3"):
        tokenize(["a dog", 3])
