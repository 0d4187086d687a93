"""Co-DETR: auxiliary heads, and their positive samples as queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.detection.atss import assign, square_anchors
from models.detection.co_detr import GROUPS, CoDETR
from models.detection.detector import pad_images
from models.detection.dino import DINO
from models.detection.positives import Positives, as_queries
from models.detection.queries import PADDED, PADDING, Queries, Targets
from models.detection.set_prediction import image_mask, relative_targets
from tests.models.detection.small import CLASSES, DECODER, small_backbone, two_images
from tests.models.small import without_gradient

HEADS = ("atss.", "faster_rcnn.", "positive_contents.")


def small_co_detr(**options: Any) -> CoDETR:
    torch.manual_seed(0)
    return CoDETR(small_backbone(1, 2, 3), num_classes=CLASSES, num_queries=20, **DECODER, **options)


@pytest.mark.parametrize("options", [{}, {"mixed_query_selection": False, "anchor_positions": False, "denoising": 0}])
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    detector = small_co_detr(**options)
    images, targets = two_images()
    with_objects, without = detector(images, targets), detector(images, targets[1:] * 2)
    assert {"atss", "atss_queries", "faster_rcnn", "faster_rcnn_queries"} <= with_objects.keys()
    assert list(with_objects) == list(without)
    for losses in (with_objects, without):
        detector.zero_grad()
        sum(losses.values()).backward()
        assert without_gradient(detector) == []


@torch.no_grad()
def test_heads_weigh_as_much_as_all_layers_of_the_decoder() -> None:
    detector, named = small_co_detr(head_weight=3.0), {}
    for name in ("atss", "faster_rcnn"):
        getattr(detector, name).register_forward_hook(lambda _, __, out, name=name: named.update({name: out[0]}))
    losses = detector(*two_images())
    for name, terms in named.items():
        torch.testing.assert_close(losses[name], 3 * DECODER["decoder_layers"] * sum(terms.values()))


@torch.no_grad()
def test_evaluation_equals_dino() -> None:
    detector = small_co_detr().eval()
    dino = DINO(small_backbone(1, 2, 3), num_classes=CLASSES, num_queries=20, **DECODER).eval()
    dino.load_state_dict({name: x for name, x in detector.state_dict().items() if not name.startswith(HEADS)})
    images, _ = two_images()
    for one, other in zip(detector(images), dino(images), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_positive_queries_do_not_influence_other_queries() -> None:
    detector = small_co_detr(denoising=0)
    images, targets = two_images()
    batch = pad_images(images, 32)
    memory = detector.encode(batch.tensors, image_mask(batch))
    truth = Targets(relative_targets(targets, batch.image_sizes))
    (atss, faster_rcnn), assignments, _ = detector.extra_queries(memory, truth, batch)
    assert all((assignment[0] >= 0).any() and (assignment[1] == PADDING).all() for assignment in assignments.values())
    matched = detector.select_queries(memory)[1]
    alone = detector.decode(memory, matched)[-1][0]
    one = detector.decode(memory, Queries.joined([atss, faster_rcnn, matched]))[-1][0]
    changed = atss._replace(contents=atss.contents + 1)
    other = detector.decode(memory, Queries.joined([changed, faster_rcnn, matched]))[-1][0]
    known = atss.contents.shape[1]
    torch.testing.assert_close(one[:, -matched.contents.shape[1] :], alone, rtol=0, atol=1e-5)
    assert torch.equal(one[0, known:], other[0, known:])
    assert not torch.equal(one[0, :known], other[0, :known])


def test_anchors_are_assigned_by_distance_and_overlap() -> None:
    maps = [torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 8, 8)]
    anchors = square_anchors(maps, [8, 16])
    assert anchors[0].tolist() == [4 - 32, 4 - 32, 4 + 32, 4 + 32]
    boxes = torch.tensor([[10.0, 10.0, 70.0, 74.0], [64.0, 60.0, 124.0, 124.0]])
    assigned = assign(anchors, [256, 64], boxes)
    for i, box in enumerate(boxes):
        found = anchors[assigned == i]
        assert 1 <= len(found) <= 18
        centers = (found[:, :2] + found[:, 2:]) / 2
        assert bool(((centers > box[:2]) & (centers < box[2:])).all())
        assert bool((found[:, 2] - found[:, 0] == 64).all())  # anchors of the other level have too small an IoU
    assert (assigned == -1).sum() >= len(anchors) - 36
    assert bool((assign(anchors, [256, 64], boxes[:0]) == -1).all())


def test_positive_samples_become_queries_at_their_boxes() -> None:
    one = Positives(torch.tensor([[0.0, 0.0, 32.0, 16.0]] * 3), torch.tensor([1, 0, 1]), torch.ones(3, 4))
    none = Positives(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    group, samples = GROUPS["atss"], [one.at_most(2), none.at_most(2)]
    queries, assignment = as_queries(samples, [(64, 64)] * 2, torch.nn.Identity(), group)
    assert queries.boxes[0].tolist() == [[0.25, 0.125, 0.5, 0.25]] * 2
    assert queries.groups.tolist() == [[group, group], [PADDED, PADDED]]
    assert assignment[1].tolist() == [PADDING, PADDING]


def test_wrong_arguments_are_rejected() -> None:
    with pytest.raises(
        ValueError, match="CoDETR does not take the argument 'encoder_layer'; did you mean encoder_layers"
    ):
        small_co_detr(encoder_layer=3)
