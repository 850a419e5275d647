"""The processor on the tiny model: both resize modes, prompts, batches, thresholds, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sam3.model.config import Sam3Config
from sam3.model.sam3_image_processor import Sam3Processor, to_uint8_chw
from sam3.model_builder import assemble_image_model
from sam3.transforms import Preprocess
from tests.parity.fill import fill_, image

HEIGHT, WIDTH = 90, 160
BOX = [0.5, 0.5, 0.4, 0.3]


def make_model(resize: str = "square"):
    model = assemble_image_model(Sam3Config.preset("tiny"), preprocess=Preprocess(img_size=224, resize=resize))
    fill_(model.state_dict(), "detector.")
    return model


@pytest.fixture(scope="module", params=["square", "pad"])
def processor(request) -> Sam3Processor:
    return Sam3Processor(make_model(request.param), confidence_threshold=0.0)


@pytest.fixture
def state(processor) -> dict:
    return processor.set_image(Image.fromarray(image(HEIGHT, WIDTH)))


def test_results_have_the_promised_shapes(processor, state):
    processor.set_text_prompt("a red car", state)
    count = len(state["scores"])
    assert count == 20
    assert state["masks"].shape == state["masks_logits"].shape == (count, 1, HEIGHT, WIDTH)
    assert state["masks"].dtype == torch.bool
    assert torch.equal(state["masks"], state["masks_logits"] > 0.5)
    assert 0 <= state["masks_logits"].min() <= state["masks_logits"].max() <= 1
    assert state["boxes"].shape == (count, 4)
    assert (state["original_height"], state["original_width"]) == (HEIGHT, WIDTH)


def test_scores_boxes_and_masks_follow_from_the_outputs(processor, state):
    processor.set_text_prompt("a red car", state)
    out = state["outputs"]
    scores = out["pred_logits"].sigmoid()[0, :, 0] * out["presence_logit_dec"].sigmoid()[0]
    torch.testing.assert_close(state["scores"], scores)
    with torch.inference_mode():
        logits = processor.model.predict_masks(out)["pred_masks"][0]
    # The square sees the picture whole; in pad mode it fills the left 160/160 and the top 90/160 of it.
    rows = 1.0 if processor.preprocess.resize == "square" else 126 / 224
    scale = torch.tensor([WIDTH, HEIGHT / rows, WIDTH, HEIGHT / rows])
    torch.testing.assert_close(state["boxes"], out["pred_boxes_xyxy"][0] * scale, rtol=0, atol=1e-3)
    content = logits[:, None, : round(rows * 64)]
    wanted = torch.nn.functional.interpolate(content, (HEIGHT, WIDTH), mode="bilinear").sigmoid()
    torch.testing.assert_close(state["masks_logits"], wanted, rtol=0, atol=1e-4)


def test_a_box_reaches_the_model_in_coordinates_of_its_square(processor, state):
    processor.add_geometric_prompt(BOX, True, state)
    processor.add_point_prompt([80, 45], False, state)
    prompt = state["geometric_prompt"]
    rows = 1.0 if processor.preprocess.resize == "square" else 126 / 224
    wanted = torch.tensor([0.5, 0.5 * rows, 0.4, 0.3 * rows])
    torch.testing.assert_close(prompt.box_embeddings[0, 0], wanted)
    torch.testing.assert_close(prompt.point_embeddings[0, 0], torch.tensor([0.5, 0.5 * rows]))
    assert prompt.box_labels.tolist() == [[1]]
    assert prompt.point_labels.tolist() == [[0]]


def test_set_prompts_equals_one_prompt_after_the_other(processor, state):
    processor.set_text_prompt("a red car", state)
    text_only = state["scores"]
    processor.add_geometric_prompt(BOX, True, state)
    processor.add_geometric_prompt([0.2, 0.3, 0.2, 0.2], False, state)
    processor.add_point_prompt([30, 40], True, state)
    step_by_step = state["scores"]
    assert not torch.allclose(step_by_step, text_only)
    processor.set_prompts(
        state, "a red car", boxes=[(BOX, True), ([0.2, 0.3, 0.2, 0.2], False)], points=[([30, 40], True)]
    )
    torch.testing.assert_close(state["scores"], step_by_step)


def test_boxes_alone_use_the_visual_phrase(processor, state):
    processor.add_geometric_prompt(BOX, True, state)
    alone = state["scores"]
    processor.set_prompts(state, "visual", boxes=[(BOX, True)])
    torch.testing.assert_close(state["scores"], alone)
    processor.set_prompts(state, "a red car", boxes=[(BOX, True)])
    assert not torch.allclose(state["scores"], alone)


def test_reset_keeps_the_picture_and_forgets_the_rest(processor, state):
    processor.set_text_prompt("a red car", state)
    before = state["scores"]
    processor.add_geometric_prompt(BOX, True, state)
    processor.reset_all_prompts(state)
    assert "language_features" not in state["backbone_out"]
    assert not {"geometric_prompt", "masks", "masks_logits", "boxes", "scores"} & set(state)
    processor.set_text_prompt("a red car", state)
    torch.testing.assert_close(state["scores"], before)


def test_thresholds_choose_and_nothing_found_is_legal(processor, state):
    processor.set_text_prompt("a red car", state)
    scores, masks = state["scores"], state["masks_logits"]
    threshold = scores.median().item()
    processor.set_confidence_threshold(threshold, state)
    kept = scores > threshold
    assert 0 < kept.sum() < len(scores)
    assert torch.equal(state["scores"], scores[kept])
    torch.testing.assert_close(state["masks_logits"], masks[kept], rtol=0, atol=1e-5)
    processor.set_confidence_threshold(1.0, state)
    assert state["masks"].shape == state["masks_logits"].shape == (0, 1, HEIGHT, WIDTH)
    assert state["boxes"].shape == (0, 4)
    assert processor.best_score(state) == scores.max().item()
    processor.set_confidence_threshold(0.0)


def test_nothing_kept_means_no_mask_is_computed(processor, state):
    calls = []
    hook = processor.model.segmentation_head.register_forward_hook(lambda *_: calls.append(1))
    processor.set_confidence_threshold(1.0)
    processor.set_text_prompt("a red car", state)
    processor.set_confidence_threshold(0.0)
    hook.remove()
    assert not calls


def test_top_k_keeps_the_best_in_query_order(processor, state):
    processor.set_text_prompt("a red car", state)
    scores = state["scores"]
    few = Sam3Processor(processor.model, confidence_threshold=0.0, top_k=3)
    few.set_text_prompt("a red car", state)
    best = scores.topk(3).indices.sort().values
    torch.testing.assert_close(state["scores"], scores[best])


def test_a_batch_gives_each_picture_its_own_results(processor):
    pictures = [Image.fromarray(image(HEIGHT, WIDTH)), Image.fromarray(image(120, 70, seed=3))]
    state = processor.set_image_batch(pictures)
    assert state["original_widths"] == [WIDTH, 70]
    for index, picture in reversed(list(enumerate(pictures))):
        processor.set_text_prompt("a red car", state, index=index)
        processor.add_geometric_prompt(BOX, True, state)
        alone = processor.set_image(picture)
        processor.set_prompts(alone, "a red car", boxes=[(BOX, True)])
        for name in ("scores", "boxes", "masks_logits"):
            torch.testing.assert_close(state[name], alone[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="picture 2 of a batch of 2"):
        processor.set_text_prompt("a red car", state, index=2)


def test_another_picture_of_the_batch_starts_without_boxes(processor):
    state = processor.set_image_batch([image(HEIGHT, WIDTH), image(HEIGHT, WIDTH, seed=3)])
    processor.add_geometric_prompt(BOX, True, state)
    processor.set_text_prompt("a red car", state, index=1)
    assert "geometric_prompt" not in state


def test_a_new_picture_drops_the_old_prompts(processor, state):
    processor.add_geometric_prompt(BOX, True, state)
    processor.set_image(image(50, 60), state)
    assert "geometric_prompt" not in state
    assert "scores" not in state
    assert (state["original_height"], state["original_width"]) == (50, 60)


def test_bfloat16_comes_close(processor, state):
    processor.set_text_prompt("a red car", state)
    low = Sam3Processor(processor.model, confidence_threshold=0.0, autocast_dtype=torch.bfloat16)
    low_state = low.set_image(Image.fromarray(image(HEIGHT, WIDTH)))
    low.set_text_prompt("a red car", low_state)
    assert low_state["masks_logits"].dtype == torch.float32
    assert (low_state["scores"] - state["scores"]).abs().max() < 0.1
    assert not torch.equal(low_state["scores"], state["scores"])


def test_pictures_of_every_kind_give_the_same_pixels():
    pixels = image(6, 8)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)
    alpha = np.concatenate((pixels, np.full((6, 8, 1), 7, np.uint8)), axis=2)
    kinds = [
        Image.fromarray(pixels), pixels, alpha, wanted, np.ascontiguousarray(pixels.transpose(2, 0, 1)),
        pixels.astype(np.float32) / 255, wanted.float() / 255,
    ]  # fmt: skip
    read_only = pixels.copy()
    read_only.flags.writeable = False
    backwards = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]  # as OpenCV's pictures are turned into RGB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (*kinds, read_only, backwards):
            assert torch.equal(to_uint8_chw(kind), wanted)
    grey = pixels[..., 0]
    for kind in (grey, grey[..., None], torch.from_numpy(grey), Image.fromarray(grey)):
        assert torch.equal(to_uint8_chw(kind), wanted[:1].expand(3, -1, -1))


def test_sixteen_bit_pictures_are_scaled_as_when_read_from_a_file():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert to_uint8_chw(deep)[0].tolist() == [[0, 100, 255]]


def test_autocast_around_the_calls_acts(processor, state):
    """SAM3's notebooks wrap everything in bfloat16 autocast."""
    processor.set_text_prompt("a red car", state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_state = processor.set_image(Image.fromarray(image(HEIGHT, WIDTH)))
        processor.set_text_prompt("a red car", low_state)
    assert low_state["backbone_out"]["backbone_fpn"][0].dtype == torch.bfloat16
    assert low_state["masks_logits"].dtype == low_state["boxes"].dtype == torch.float32
    assert (low_state["scores"] - state["scores"]).abs().max() < 0.1


def test_reset_before_any_picture_does_nothing(processor):
    state = {}
    processor.reset_all_prompts(state)
    assert state == {}


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("photo.jpg", "got str"),
        (np.zeros((2, 4, 4, 3), np.uint8), "set_image_batch"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "tensor"),
        (np.full((4, 4, 3), 200.0), "values in 0..1"),
        (np.full((4, 4, 3), np.nan), "values in 0..1"),
        (np.zeros((4, 4, 3), np.int64), "wanted uint8"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
    ],
)
def test_wrong_pictures_are_refused(picture, message: str):
    with pytest.raises(ValueError, match=message):
        to_uint8_chw(picture)


def test_wrong_calls_are_refused(processor, state):
    calls = [
        (lambda: processor.set_text_prompt("car", {}), "call set_image"),
        (lambda: processor.set_text_prompt("  ", state), "phrase"),
        (lambda: processor.add_geometric_prompt([0.5, 0.5, 0.0, 0.2], True, state), "no area"),
        (lambda: processor.add_geometric_prompt([1.5, 0.5, 0.2, 0.2], True, state), "no area inside"),
        (lambda: processor.add_geometric_prompt([0.5, 0.5, 0.2], True, state), "4 finite numbers"),
        (lambda: processor.add_point_prompt([1, float("nan")], True, state), "2 finite numbers"),
        (lambda: processor.add_point_prompt([WIDTH + 5, 10], True, state), "outside the picture"),
        (lambda: processor.set_prompts(state), "nothing to look for"),
        (lambda: processor.set_confidence_threshold(1.5), "0..1"),
        (lambda: processor.set_image_batch([]), "at least one"),
        (lambda: Sam3Processor(processor.model, resolution=1008), "works at 224 px"),
        (lambda: Sam3Processor(processor.model, top_k=0), "top_k"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_without_text_encoder_says_so():
    model = assemble_image_model(Sam3Config.preset("tiny"), enable_text_encoder=False)
    processor = Sam3Processor(model)
    state = processor.set_image(image(20, 30))
    with pytest.raises(ValueError, match="text encoder"):
        processor.set_text_prompt("car", state)
