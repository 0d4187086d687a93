"""DINO: parity with transformers' Deformable DETR, and each of its additions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from models.detection.backbone_adapter import AdapterConfig, adapt
from models.detection.denoising import noised_queries
from models.detection.detector import pad_images
from models.detection.dino import DINO
from models.detection.queries import MATCHED, NO_OBJECT, PADDING, Targets, match, set_losses
from models.detection.set_prediction import image_mask, relative_targets
from tests.models.detection.small import CLASSES, DECODER, small_backbone, two_images
from tests.models.small import without_gradient

OFF = {"denoising": 0, "mixed_query_selection": False, "anchor_positions": False, "look_forward_twice": False}


def small_dino(**options: Any) -> DINO:
    torch.manual_seed(0)
    options = {"num_queries": 20, **DECODER, **options}
    return DINO(small_backbone(1, 2, 3), num_classes=CLASSES, **options)


def deformable_detr(dino: DINO) -> DeformableDetrForObjectDetection:
    """Return transformers' Deformable DETR with the weights of `dino`, after perturbing them."""
    config = DeformableDetrConfig(
        backbone_config=AdapterConfig(channels=dino.backbone.channels),
        num_labels=CLASSES,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=20,
        auxiliary_loss=True,
        **DECODER,
    )
    theirs = DeformableDetrForObjectDetection(config)
    adapt(theirs, dino.backbone)
    with torch.no_grad():
        for parameter in dino.transformer.parameters():
            parameter.copy_(parameter / 2 + 0.05 * torch.randn_like(parameter))
    missing, unexpected = theirs.model.load_state_dict(dino.transformer.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("pos_trans") for name in missing)
    return theirs.eval()


@pytest.mark.parametrize(
    "added", [{}, {"denoising": 100}, {"look_forward_twice": True}, {"denoising": 100, "look_forward_twice": True}]
)
@torch.no_grad()
def test_without_additions_dino_equals_transformers_deformable_detr(added: dict[str, Any]) -> None:
    # Denoising and looking forward twice change only training.
    dino = small_dino(**{**OFF, **added}).eval()
    theirs = deformable_detr(dino)
    batch = pad_images(two_images()[0], 32)
    expected = theirs(batch.tensors, image_mask(batch).long())
    memory = dino.encode(batch.tensors, image_mask(batch))
    (proposed_logits, proposed_boxes), queries = dino.select_queries(memory)
    layers = dino.decode(memory, queries)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(memory.features, expected.encoder_last_hidden_state, **close)
    torch.testing.assert_close(proposed_logits, expected.enc_outputs_class, **close)
    torch.testing.assert_close(proposed_boxes, expected.enc_outputs_coord_logits.sigmoid(), **close)
    torch.testing.assert_close(queries.boxes, expected.init_reference_points, **close)
    torch.testing.assert_close(layers[-1][0], expected.logits, **close)
    for (_, boxes), reference in zip(layers, expected.intermediate_reference_points.unbind(1), strict=True):
        torch.testing.assert_close(boxes, reference, **close)
    assert layers[-1][1].std() > 0.01  # boxes differ from each other


@pytest.mark.parametrize("added", [{"mixed_query_selection": True}, {"anchor_positions": True}])
@torch.no_grad()
def test_query_initialisations_share_the_encoder_and_its_proposals(added: dict[str, Any]) -> None:
    dino = small_dino(**{**OFF, **added}).eval()
    theirs = deformable_detr(dino)
    batch = pad_images(two_images()[0], 32)
    expected = theirs(batch.tensors, image_mask(batch).long())
    memory = dino.encode(batch.tensors, image_mask(batch))
    proposals, queries = dino.select_queries(memory)
    wanted = expected.enc_outputs_class
    if dino.contents is not None:
        wanted = wanted.gather(1, wanted.amax(-1, keepdim=True).topk(20, dim=1).indices.expand(-1, -1, CLASSES))
    torch.testing.assert_close(proposals[0], wanted, rtol=0, atol=1e-5)
    assert (dino.decode(memory, queries)[-1][0] - expected.logits).abs().max() > 1e-3


def test_the_loss_of_the_encoder_covers_the_selected_proposals_and_trains_their_boxes() -> None:
    dino = small_dino()
    batch = pad_images(two_images()[0], 32)
    (logits, boxes), queries = dino.select_queries(dino.encode(batch.tensors, image_mask(batch)))
    assert logits.shape == (2, 20, CLASSES)
    assert torch.equal(boxes, queries.boxes)
    (grad,) = torch.autograd.grad(boxes.sum(), dino.transformer.decoder.bbox_embed[-1].layers[-1].bias)
    assert bool(grad.any())
    assert not queries.boxes.requires_grad


def test_looking_forward_twice_trains_the_layer_before() -> None:
    for twice in (False, True):
        dino = small_dino(denoising=0, look_forward_twice=twice)
        batch = pad_images(two_images()[0], 32)
        memory = dino.encode(batch.tensors, image_mask(batch))
        boxes = dino.decode(memory, dino.select_queries(memory)[1])[-1][1]
        head = dino.transformer.decoder.bbox_embed[0].layers[-1].bias
        (grad,) = torch.autograd.grad(boxes.sum(), head, allow_unused=True)
        assert (grad is not None and bool(grad.abs().sum() > 0)) == twice


@pytest.mark.parametrize("off", [(), ("denoising",), ("mixed_query_selection",), ("anchor_positions",), tuple(OFF)])
def test_every_parameter_gets_a_gradient(off: tuple[str, ...]) -> None:
    dino = small_dino(**{name: OFF[name] for name in off})
    images, targets = two_images()
    with_objects, without = dino(images, targets), dino(images, targets[1:] * 2)
    assert list(with_objects) == list(without)
    for losses in (with_objects, without):
        dino.zero_grad()
        sum(losses.values()).backward()
        assert without_gradient(dino) == []


def test_without_objects_there_are_no_denoising_queries() -> None:
    truth = Targets([{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    queries, assignment = noised_queries(truth, torch.nn.Embedding(3, 8), 100, label_noise=0.5, box_noise=1.0)
    assert [tuple(tensor.shape) for tensor in (*queries, assignment)] == [(2, 0, 8), (2, 0, 4), (2, 0), (2, 0)]
    images, targets = two_images()
    assert small_dino()(images, targets[1:] * 2)["denoising"] == 0


def test_small_images_have_fewer_queries() -> None:
    dino = small_dino(num_queries=50)
    found = dino.eval()([torch.rand(3, 32, 32)] * 2)
    assert len(found[0]["boxes"]) == CLASSES * (4 * 4 + 2 * 2 + 1 + 1)  # all pixels of all maps


@torch.no_grad()
def test_denoising_groups_are_hidden_from_matched_queries_and_each_other() -> None:
    dino = small_dino().train()
    images, targets = two_images()
    batch = pad_images(images, 32)
    memory = dino.encode(batch.tensors, image_mask(batch))
    truth = Targets(relative_targets(targets, [(64, 48), (60, 64)]))
    queries = dino.select_queries(memory)[1]
    noised, _ = noised_queries(truth, dino.label_contents, 10, label_noise=0.5, box_noise=1.0)
    other = noised._replace(contents=noised.contents + 1, boxes=1 - noised.boxes)
    known = noised.contents.shape[1]
    one, two = (dino.decode(memory, type(queries).joined([extra, queries])) for extra in (noised, other))
    for (logits, boxes), (others, other_boxes) in zip(one, two, strict=True):
        assert torch.equal(logits[:, known:], others[:, known:])
        assert torch.equal(boxes[:, known:], other_boxes[:, known:])
        assert not torch.equal(logits[:, :known], others[:, :known])
    first = noised.groups == MATCHED + 1
    changed = noised._replace(contents=torch.where(first.unsqueeze(-1), other.contents, noised.contents))
    after = dino.decode(memory, type(queries).joined([changed, queries]))[-1][0][0, :known]
    moved = (after != one[-1][0][0, :known]).any(-1)
    assert torch.equal(moved, first[0])


def test_noise_has_the_documented_scale() -> None:
    torch.manual_seed(0)
    images = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1]] * 2), "class_labels": torch.tensor([1, 2])}]
    images.append({"boxes": images[0]["boxes"][:1], "class_labels": images[0]["class_labels"][:1]})
    truth = Targets(images)
    queries, assignment = noised_queries(truth, torch.nn.Embedding(3, 8), 100, label_noise=0.5, box_noise=1.0)
    assert assignment.shape == (2, 50 * 2 * 2)
    assert [int((row >= 0).sum()) for row in assignment] == [100, 50]
    assert [int((row == PADDING).sum()) for row in assignment] == [0, 100]
    center, size = queries.boxes[..., :2], queries.boxes[..., 2:]
    corners = torch.cat([center - size / 2, center + size / 2], -1)
    moved = (corners - torch.tensor([0.4, 0.45, 0.6, 0.55])).abs() / torch.tensor([0.1, 0.05, 0.1, 0.05])
    positive, negative = moved[assignment >= 0], moved[assignment == NO_OBJECT]
    assert 0.9 < positive.max() <= 1.0001
    # Where opposite corners pass each other, the side is 0 and not negative.
    assert (queries.boxes >= 0).all()
    assert (size[assignment == NO_OBJECT] == 0).any()
    assert negative.max() <= 2.0001
    assert negative.mean() > positive.mean() + 0.5


def test_nan_in_a_prediction_makes_the_loss_nan_but_not_the_matching() -> None:
    torch.manual_seed(0)
    truth = Targets(relative_targets(two_images()[1], [(64, 48), (60, 64)]))
    logits, boxes = torch.randn(2, 20, CLASSES), torch.rand(2, 20, 4) / 2 + 0.25
    expected = match(logits, boxes, truth)
    unused = int((expected[0] == NO_OBJECT).nonzero()[0])
    logits[0, unused], boxes[0, unused] = torch.nan, torch.nan
    assert (match(logits, boxes, truth) >= 0).sum() == truth.total
    assert (match(logits * torch.nan, boxes * torch.nan, truth) >= 0).sum() == truth.total
    dino = small_dino()
    torch.nn.init.constant_(dino.transformer.decoder.bbox_embed[0].layers[-1].bias, torch.nan)
    assert sum(dino(*two_images()).values()).isnan()


def test_losses_equal_those_of_transformers() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 20, CLASSES), torch.rand(2, 20, 4) / 2 + 0.25
    truth = Targets(relative_targets(two_images()[1], [(64, 48), (60, 64)]))
    criterion = DeformableDetrImageLoss(DeformableDetrHungarianMatcher(2, 5, 2), CLASSES, 0.25, ["labels", "boxes"])
    theirs = criterion({"logits": logits, "pred_boxes": boxes}, truth.images)
    ours = set_losses(logits, boxes, match(logits, boxes, truth), truth)
    torch.testing.assert_close(ours["class"], theirs["loss_ce"])
    torch.testing.assert_close(ours["l1"], 5 * theirs["loss_bbox"])
    torch.testing.assert_close(ours["giou"], 2 * theirs["loss_giou"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_layer": 3}, "DINO does not take the argument 'encoder_layer'; did you mean encoder_layers"),
        ({"num_querys": 3}, "DINO does not take the argument 'num_querys'; did you mean num_queries"),
        *(
            ({name: 1}, f"DINO does not take the argument '{name}'")
            for name in (
                *("bbox_loss_coefficient", "giou_loss_coefficient", "class_cost", "bbox_cost", "giou_cost"),
                *("focal_alpha", "auxiliary_loss", "two_stage", "two_stage_num_proposals", "with_box_refine"),
            )
        ),
        ({"d_model": "wide"}, "DINO: .*d_model"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_dino(**arguments)


@torch.no_grad()
def test_autocast_does_not_round_boxes() -> None:
    # All pixels become queries. From column 128 on, the centre of a pixel is not representable in bfloat16.
    dino, found = small_dino(num_queries=1000).eval(), []
    for head in dino.transformer.decoder.bbox_embed:
        torch.nn.init.zeros_(head.layers[-1].weight)
        head.layers[-1].bias.copy_(torch.linspace(-0.3, 0.4, 4))
    images, inside = torch.rand(1, 3, 32, 1280), torch.ones(1, 32, 1280, dtype=torch.bool)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            boxes = dino.predict(images, inside)[1]
        assert boxes.dtype == torch.float32
        found.append(torch.tensor(sorted(boxes[0].tolist())))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
