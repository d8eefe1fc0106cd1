import pytest

from mtr_lab.data import imagenet_classes, map_classes
from mtr_lab.errors import UserError

IMAGENETTE = {
    "n01440764": 0,  # tench
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,  # parachute
}


def test_imagenet_classes_are_the_thousand_wordnet_ids_in_order() -> None:
    classes = imagenet_classes()
    assert len(set(classes)) == 1000
    assert list(classes) == sorted(classes)
    assert all(len(name) == 9 and name[0] == "n" for name in classes)


def test_imagenette_meets_imagenet_weights_by_name() -> None:
    assert map_classes(list(IMAGENETTE), imagenet_classes(), 1000) == list(IMAGENETTE.values())
    backwards = list(IMAGENETTE)[::-1]
    assert map_classes(backwards, imagenet_classes(), 1000) == [IMAGENETTE[name] for name in backwards]


def test_equal_names_in_another_order_are_mapped_by_name() -> None:
    assert map_classes(["a", "b", "c"], ["c", "a", "b"], 3) == [1, 2, 0]


@pytest.mark.parametrize(
    ("dataset", "model"), [(["a", "b"], None), (None, ["x", "y"]), (None, None)], ids=["dataset", "model", "neither"]
)
def test_labels_are_outputs_where_one_side_has_no_names(dataset: list[str] | None, model: list[str] | None) -> None:
    assert map_classes(dataset, model, 2) is None


def test_equal_counts_do_not_hide_other_names() -> None:
    with pytest.raises(UserError, match=r"3 classes, the model 3.*1 of the.*'fish'.*dataset\.classes"):
        map_classes(["cat", "dog", "fish"], ["cat", "dog", "bird"], 3)


def test_other_counts_without_names_name_both() -> None:
    with pytest.raises(UserError, match=r"2 classes \('cat', 'dog'\) and the model 1000 outputs"):
        map_classes(["cat", "dog"], None, 1000)


def test_names_have_to_be_as_many_as_outputs() -> None:
    with pytest.raises(UserError, match=r"10 outputs but 2 class names .*: .* set backbone\.num_classes=2"):
        map_classes(None, ["a", "b"], 10)
