"""The student's processor on the tiny student: what it finds, what it computes once, what it refuses."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from distillation.models.tokenizer import tokenize
from distillation.processor import StudentProcessor
from tests.distillation.slim import PROMPTS, SIDE, tiny_student
from tests.parity.fill import image

HEIGHT, WIDTH = 90, 160
RESULTS = ("scores", "boxes", "masks_logits", "masks")


@pytest.fixture(scope="module")
def processor() -> StudentProcessor:
    return StudentProcessor(tiny_student().train(), confidence_threshold=0.0)


@pytest.fixture
def state(processor) -> dict:
    return processor.set_image(Image.fromarray(image(HEIGHT, WIDTH)))


def test_results_follow_from_the_students_own_forward(processor, state):
    assert not processor.model.training
    processor.set_text_prompt(PROMPTS[1], state)
    squashed, size = processor.preprocess.fit(torch.from_numpy(image(HEIGHT, WIDTH)).permute(2, 0, 1))
    assert size == (SIDE, SIDE)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        out = processor.model(((squashed / 255 - mean) / std)[None], *tokenize([PROMPTS[1]]))
    scores = out["pred_logits"][0].sigmoid() * out["presence_logits"][0].sigmoid()
    torch.testing.assert_close(state["scores"], scores, rtol=1e-4, atol=1e-5)
    scale = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    torch.testing.assert_close(state["boxes"], out["pred_boxes"][0] * scale, rtol=0, atol=0.01)
    wanted = torch.nn.functional.interpolate(out["pred_masks"], (HEIGHT, WIDTH), mode="bilinear")[0].sigmoid()
    torch.testing.assert_close(state["masks_logits"], wanted[:, None], rtol=0, atol=1e-3)
    assert state["masks"].dtype == torch.bool
    assert state["masks"].shape == (10, 1, HEIGHT, WIDTH)
    assert torch.equal(state["masks"], state["masks_logits"] > 0.5)
    assert (state["original_height"], state["original_width"]) == (HEIGHT, WIDTH)


def test_the_picture_is_encoded_once_for_several_phrases(processor):
    calls = {"vision": 0, "text": 0, "mask_decoder": 0}
    hooks = [
        getattr(processor.model, name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
        for name in calls
    ]
    state = processor.set_image(image(HEIGHT, WIDTH))
    found = [processor.set_text_prompt(prompt, state)["scores"] for prompt in PROMPTS]
    again = processor.set_prompts(state, text=PROMPTS[0])["scores"]
    processor.set_confidence_threshold(1.0, state)
    processor.set_confidence_threshold(0.0)
    for hook in hooks:
        hook.remove()
    assert calls == {"vision": 1, "text": 3, "mask_decoder": 3}  # none for the objects that nobody keeps
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[0], again)


def test_threshold_and_top_k_choose(processor, state):
    processor.set_text_prompt(PROMPTS[0], state)
    scores, boxes, masks = state["scores"], state["boxes"], state["masks_logits"]
    threshold = scores.median().item()
    processor.set_confidence_threshold(threshold, state)
    kept = scores > threshold
    assert 0 < kept.sum() < len(scores)
    assert torch.equal(state["scores"], scores[kept])
    assert torch.equal(state["boxes"], boxes[kept])
    torch.testing.assert_close(state["masks_logits"], masks[kept], rtol=0, atol=1e-5)
    processor.set_confidence_threshold(1.0, state)
    assert state["masks"].shape == (0, 1, HEIGHT, WIDTH)
    assert state["boxes"].shape == (0, 4)
    assert processor.best_score(state) == scores.max().item()
    processor.set_confidence_threshold(0.0)

    few = StudentProcessor(processor.model, confidence_threshold=0.0, top_k=3)
    few.set_text_prompt(PROMPTS[0], state)
    best = scores.topk(3).indices.sort().values
    torch.testing.assert_close(state["scores"], scores[best])
    torch.testing.assert_close(state["masks_logits"], masks[best], rtol=0, atol=1e-5)


def test_a_batch_gives_each_picture_its_own_results(processor):
    pictures = [image(HEIGHT, WIDTH), image(120, 70, seed=3)]
    state = processor.set_image_batch(pictures)
    for index, picture in reversed(list(enumerate(pictures))):
        processor.set_text_prompt(PROMPTS[1], state, index=index)
        alone = processor.set_text_prompt(PROMPTS[1], processor.set_image(picture))
        for name in ("scores", "boxes", "masks_logits"):
            torch.testing.assert_close(state[name], alone[name], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="picture 2 of a batch of 2"):
        processor.set_text_prompt(PROMPTS[0], state, index=2)


def test_reset_keeps_the_picture_and_forgets_the_rest(processor, state):
    before = processor.set_text_prompt(PROMPTS[0], state)["scores"]
    processor.reset_all_prompts(state)
    assert set(state["backbone_out"]) == {"levels"}
    assert not set(RESULTS) & set(state)
    assert torch.equal(processor.set_text_prompt(PROMPTS[0], state)["scores"], before)


def test_bfloat16_comes_close(processor, state):
    processor.set_text_prompt(PROMPTS[0], state)
    low = StudentProcessor(processor.model, confidence_threshold=0.0, autocast_dtype=torch.bfloat16)
    low_state = low.set_text_prompt(PROMPTS[0], low.set_image(image(HEIGHT, WIDTH)))
    assert low_state["backbone_out"]["levels"][0].dtype == torch.bfloat16
    assert all(low_state[name].dtype == torch.float32 for name in ("scores", "boxes", "masks_logits"))
    assert 0 < (low_state["scores"] - state["scores"]).abs().max() < 0.1


def test_boxes_points_and_bad_calls_are_refused(processor, state):
    calls = [
        (lambda: processor.add_geometric_prompt([0.5, 0.5, 0.2, 0.2], True, state), "phrases only, no boxes"),
        (lambda: processor.add_point_prompt([3, 4], True, state), "phrases only, no points"),
        (lambda: processor.set_prompts(state, boxes=[([0.5, 0.5, 0.2, 0.2], True)]), "phrases only, no boxes"),
        (lambda: processor.set_prompts(state), "nothing to look for"),
        (lambda: processor.set_text_prompt(PROMPTS[0], {}), "call set_image"),
        (lambda: processor.set_text_prompt(" ", state), "a text prompt is a phrase"),
        (lambda: processor.set_confidence_threshold(1.5), "0..1"),
        (lambda: StudentProcessor(processor.model, top_k=0), "top_k"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
