"""The frozen path against inference, rows and chunks of prompts, the stored text features."""

from __future__ import annotations

import pytest
import torch

from sam3.engine.weights import load_weights, save_weights
from sam3.model.sam3_image_processor import Sam3Processor
from stage1_geometry_finetune import frozen_path as module
from stage1_geometry_finetune.frozen_path import FrozenPath, PromptRows, visual_text_features
from tests.parity.fill import image
from tests.stage1_geometry_finetune.tiny import GRID, MASK, QUERIES, frozen_path, make_batch, whole_model

OUTPUTS = ("pred_logits", "pred_boxes", "presence_logit_dec", "queries")
HASH = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def shown():
    """Processor, its state after one picture of the square's size, and the trunk's grid of that picture."""
    processor, seen = Sam3Processor(whole_model(), confidence_threshold=0.0), {}
    trunk = whole_model().backbone.vision_backbone.trunk
    hook = trunk.register_forward_hook(lambda module, args, out: seen.update(grid=out[-1]))
    state = processor.set_image(image(224, 224))
    hook.remove()
    return processor, state, seen["grid"].clone()


@torch.no_grad()
def run(path: FrozenPath, grid: torch.Tensor, rows: PromptRows) -> dict[str, torch.Tensor]:
    out = path.predict(path.features(grid), rows)
    return {**{name: out[name] for name in OUTPUTS}, "masks": path.masks(out)}


def one_row(box=None, point=None) -> PromptRows:
    """A prompt of image 0: box xyxy, point xy."""
    batch = make_batch([["both"]])
    batch.boxes[0, 0] = torch.tensor(box or (0.0,) * 4)
    batch.points[0, 0] = torch.tensor(point or (0.0,) * 2)
    batch.kinds = [["both" if box and point else "box" if box else "point"]]
    return next(PromptRows.from_batch(batch, "per_object").chunks(1))


@pytest.mark.parametrize("given", ["box", "point", "both"])
def test_outputs_are_those_of_the_processor(shown, given):
    """To the bit: same trunk output, same prompts, "visual" text, three levels."""
    processor, state, grid = shown
    box = None if given == "point" else (0.375, 0.25, 0.625, 0.75)
    point = None if given == "box" else (0.25, 0.375)
    boxes = [([0.5, 0.5, 0.25, 0.5], True)] if box else []
    points = [([56, 84], True)] if point else []
    processor.set_prompts(state, boxes=boxes, points=points)
    if point:  # the very number that the processor makes of 56 and 84 pixels
        exact = state["geometric_prompt"].point_embeddings[0, 0]
        assert exact.tolist() == pytest.approx(point)
        point = tuple(exact.tolist())
    with torch.inference_mode():
        masks = processor.model.predict_masks(state["outputs"])["pred_masks"]
    found = run(frozen_path(), grid, one_row(box, point))
    assert found["masks"].shape == (1, QUERIES, MASK, MASK)
    for name in OUTPUTS:
        assert torch.equal(found[name], state["outputs"][name]), name
    assert torch.equal(found["masks"], masks)


def test_three_levels_and_the_trunks_own_grid_as_tokens(shown):
    path, grid = frozen_path(), shown[2]
    with torch.no_grad():
        features = path.features(grid)
        out = path.predict(features, one_row(box=(0.2, 0.2, 0.5, 0.5)))
    assert [level.shape[-1] for level in features[0]["backbone_fpn"]] == [4 * GRID, 2 * GRID, GRID]
    assert out["encoder_hidden_states"].shape[0] == GRID * GRID
    prompt_tokens = out["prev_encoder_out"]["encoder_out"]["prompt_before_enc"]
    assert len(prompt_tokens) == 32 + 2  # text, the box, CLS


def test_without_text_there_are_no_text_tokens(shown):
    path = frozen_path(text=False)
    with torch.no_grad():
        out = path.predict(path.features(shown[2]), one_row(box=(0.2, 0.2, 0.5, 0.5)))
        assert len(out["prev_encoder_out"]["encoder_out"]["prompt_before_enc"]) == 2
        assert path.masks(out, torch.tensor([[3]])).isfinite().all()
    with_text = run(frozen_path(), shown[2], one_row((0.2, 0.2, 0.5, 0.5)))
    assert not torch.allclose(out["pred_logits"], with_text["pred_logits"])


def test_text_of_another_model_is_refused():
    text = {"language_features": torch.zeros(32, 1, 256), "language_mask": torch.zeros(1, 32, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"shape \(32, 1, 256\).*wanted \(L, 1, 64\)"):
        FrozenPath(frozen_path().heads, text)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_no_chunk_size_and_no_padding_changes_a_row(chunk):
    """Rows of all kinds from four images, one of them without prompts, each against itself alone."""
    batch = make_batch([["box", "point", "both"], [], ["point"], ["both", "box"]])
    grid, path = batch.embeddings.values(), frozen_path()
    rows = PromptRows.from_batch(batch, "per_object")
    assert len(rows) == 6
    chunks = list(rows.chunks(chunk))
    assert [len(each) for each in chunks] == [chunk] * (6 // chunk) + ([6 % chunk] if 6 % chunk else [])
    found = [run(path, grid, each) for each in chunks]
    alone = [run(path, grid, each) for each in rows.chunks(1)]
    for name in alone[0]:
        torch.testing.assert_close(
            torch.cat([each[name] for each in found]), torch.cat([each[name] for each in alone]), rtol=1e-4, atol=1e-4
        )


def test_rows_of_one_image_share_its_pyramid(monkeypatch):
    batch = make_batch([["box"], ["box", "point"], ["point"]])
    path, seen = frozen_path(), []
    with torch.no_grad():
        features = path.features(batch.embeddings.values())
        monkeypatch.setattr(path.heads, "predict_boxes", lambda backbone_out, *_: seen.append(backbone_out))
        rows = PromptRows.from_batch(batch, "per_object")
        path.predict(features, rows.take([1, 2]))
        path.predict(features, rows)
    shared, joined = ([len(level) for level in each["backbone_fpn"]] for each in seen)
    assert (shared, joined) == ([1, 1, 1], [3, 3, 3])
    assert seen[0]["backbone_fpn"][0].data_ptr() == features[1]["backbone_fpn"][0].data_ptr()


def test_a_prompt_names_what_it_has():
    batch = make_batch([["box", "point", "both"]])
    boxes_only, points_only = (PromptRows.of_objects(batch, [(0, 0, kind)]) for kind in ("box", "point"))
    (chunk,) = boxes_only.chunks(4)
    prompt = chunk.to_prompt()
    assert len(prompt.point_embeddings) == 0 and len(prompt.box_embeddings) == 1
    x0, y0, x1, y1 = batch.boxes[0, 0].tolist()
    wanted = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    torch.testing.assert_close(prompt.box_embeddings[0, 0], wanted)
    (chunk,) = points_only.chunks(4)
    prompt = chunk.to_prompt()
    assert len(prompt.box_embeddings) == 0
    assert torch.equal(prompt.point_embeddings[0, 0], batch.points[0, 0])
    (chunk,) = PromptRows.from_batch(batch, "per_object").chunks(4)
    prompt = chunk.to_prompt()
    assert prompt.box_mask.tolist() == [[False], [True], [False]]
    assert prompt.point_mask.tolist() == [[True], [False], [False]]


def test_per_image_puts_all_objects_into_one_row():
    batch = make_batch([["both", "both"], [], ["both", "both", "both"], ["point"]])
    rows = PromptRows.from_batch(batch, "per_image")
    assert (rows.images, rows.kinds, rows.counts) == ([0, 2, 3], ["both", "both", "point"], [2, 3, 1])
    first, second = rows.chunks(2)
    assert first.boxes.shape == (2, 3, 4)
    assert first.box_mask.tolist() == [[False, False, True], [False, False, False]]
    assert second.boxes.shape == (1, 0, 4)
    assert torch.equal(second.points, batch.points[3:, :1])
    with pytest.raises(ValueError, match="layout 'each' is unknown"):
        PromptRows.from_batch(batch, "each")


def test_layouts_coincide_for_one_object_an_image():
    batch = make_batch([["both"], ["box"], ["point"]])
    by_object, by_image = (
        run(frozen_path(), batch.embeddings.values(), PromptRows.from_batch(batch, layout)) for layout in module.LAYOUTS
    )
    for name, value in by_object.items():
        assert torch.equal(value, by_image[name])


def test_points_are_added_behind_the_valid_ones():
    batch = make_batch([["box", "point", "both"]])
    (rows,) = PromptRows.from_batch(batch, "per_object").chunks(4)
    points = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[False, False], [False, True], [True, True]])
    grown = rows.with_points(points, torch.tensor([[0, 1], [0, 0], [0, 0]]), mask)
    assert grown.point_mask.tolist() == [[False, False, True], [False, False, True], [False, True, True]]
    assert torch.equal(grown.points[0, :2], points[0])
    assert torch.equal(grown.points[1, :2], torch.stack((batch.points[0, 1], points[1, 0])))
    assert torch.equal(grown.points[2, 0], batch.points[0, 2])
    assert grown.point_labels[:, 0].tolist() == [0, 1, 1]
    assert grown.point_labels[0, 1] == 1 and grown.point_labels[1, 1] == 0
    assert grown.boxes is rows.boxes
    kept = grown.take([0, 2])
    assert kept.kinds == ["box", "both"]
    assert torch.equal(kept.points, grown.points[[0, 2]])


def test_text_features_are_computed_once(tmp_path, monkeypatch):
    asked = []
    text = {"language_features": torch.randn(32, 1, 64), "language_mask": torch.arange(32)[None] > 2}
    monkeypatch.setattr(module, "encode_phrase", lambda path, phrase: asked.append((path, phrase)) or text)
    for _ in range(2):
        found = visual_text_features(tmp_path / "sam3.pt", HASH, tmp_path / "elsewhere")
        assert all(torch.equal(found[name], text[name]) for name in text)
    assert asked == [(tmp_path / "sam3.pt", "visual")]
    (path,) = tmp_path.iterdir()
    assert path.name == "visual_text_0123456789abcdef.safetensors"
    assert load_weights(path).meta == {"phrase": "visual", "sam3_sha256": HASH}


def test_text_features_go_elsewhere_where_the_checkpoint_cannot_be_written_beside(tmp_path, monkeypatch):
    text = {"language_features": torch.randn(32, 1, 64), "language_mask": torch.arange(32)[None] > 2}
    monkeypatch.setattr(module, "encode_phrase", lambda path, phrase: text)
    (tmp_path / "file").write_text("")  # no folder, so that nobody can write into it
    visual_text_features(tmp_path / "file" / "sam3.pt", HASH, tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["visual_text_0123456789abcdef.safetensors"]
    monkeypatch.setattr(module, "encode_phrase", None)
    found = visual_text_features(tmp_path / "file" / "sam3.pt", HASH, tmp_path / "runs")
    assert torch.equal(found["language_features"], text["language_features"])


@pytest.mark.parametrize("fault", ["hash", "shape", "mask"])
def test_foreign_text_features_are_refused(tmp_path, fault):
    text = {"language_features": torch.zeros(32, 1, 64), "language_mask": torch.zeros(1, 32, dtype=torch.bool)}
    if fault == "shape":
        text["language_features"] = torch.zeros(32, 2, 64)
    if fault == "mask":
        del text["language_mask"]
    path = tmp_path / f"visual_text_{HASH[:16]}.safetensors"
    save_weights(path, text, {"phrase": "visual", "sam3_sha256": "f" * 64 if fault == "hash" else HASH})
    with pytest.raises(ValueError, match=rf"{path.name} holds .* remove the file"):
        visual_text_features(tmp_path / "sam3.pt", HASH, tmp_path)
