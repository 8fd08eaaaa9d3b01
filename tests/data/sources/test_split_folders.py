"""Split folders: names of splits in all usual forms, names of classes, and what is unclear."""

import pytest

from ssl_vit.data.sources.split_folders import folder_layout, split_role

TRAIN = [
    "train",
    "Train",
    "TRAIN",
    "training",
    "training_set",
    "TrainSet",
    "train-images",
    "train2017",
    "trn",
    "Train Data",
]
VAL = [
    "val",
    "valid",
    "Valid",
    "validation",
    "VALIDATION",
    "dev",
    "eval",
    "val2017",
    "validation_set",
    "valset",
    "Dev Set",
]
TEST = ["test", "Test", "testing", "test_set", "TestSet", "testset", "test-images", "holdout", "tst"]
CLASSES = [
    "bus",
    "trainer",
    "trains",
    "bullet train",
    "evil",
    "latest",
    "contest",
    "validity",
    "development-site",
    "0",
    "",
]


def flat(_name):
    return []


@pytest.mark.parametrize(("names", "role"), [(TRAIN, "train"), (VAL, "val"), (TEST, "test"), (CLASSES, None)])
def test_split_role_knows_the_usual_names(names, role):
    assert {name: split_role(name) for name in names} == dict.fromkeys(names, role)


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("other", [*VAL, *TEST])
def test_folder_layout_of_two_splits_is_splits(train, other):
    assert folder_layout([train, other], flat).kind == "splits"


@pytest.mark.parametrize(
    ("folders", "kind"),
    [
        (["bus", "car", "train"], "classes"),
        (["car", "train"], "classes"),
        (["bullet train", "freight train", "tram"], "classes"),
        (["control", "test"], "classes"),
        (["train"], "classes"),  # one folder alone is neither; its images have one class
        (["train", "valid", "test"], "splits"),
        (["train", "test", "test_masks", "annotations"], "splits"),
        (["masks", "no_masks"], "classes"),
        (["train", "test", "cat"], "unclear"),
        (["train", "unlabeled"], "unclear"),
        (["train_a", "train_b"], "unclear"),
        (["trainA", "trainB", "testA", "testB"], "unclear"),
        (["fold1", "fold2", "fold3"], "unclear"),
        (["train_old", "train_new", "car"], "unclear"),
        (["seg_train", "seg_test"], "splits"),
        (["ILSVRC2012_img_train", "ILSVRC2012_img_val"], "splits"),
        (["flowers_train", "flowers_valid", "flowers_test"], "splits"),
        (["traindata", "testdata"], "splits"),
        (["Trainingsdaten", "Testdaten"], "splits"),
        (["gallery", "query"], "splits"),
        (["Training", "PublicTest", "PrivateTest"], "unclear"),
        (["seg_train", "seg_test", "seg_pred"], "unclear"),
        (["red_train", "blue_train"], "classes"),
    ],
)
def test_folder_layout_goes_by_all_names(folders, kind):
    assert folder_layout(folders, flat).kind == kind


def test_folder_layout_compares_subfolders():
    same = {"train": ["cat", "dog"], "secret": ["dog", "cat"]}
    layout = folder_layout([*same], same.__getitem__)
    assert layout.kind == "unclear"
    assert "train looks like a split" in layout.reason
    own = {"train": ["ice", "steam"], "bus": ["city", "coach"]}
    assert folder_layout([*own], own.__getitem__).kind == "classes"
    alone = {"train": ["cat", "dog"], "figures": []}
    assert folder_layout([*alone], alone.__getitem__).kind == "unclear"
    cameras = {"left": ["cat", "dog"], "right": ["cat", "dog"]}
    assert folder_layout([*cameras], cameras.__getitem__).kind == "classes"
    assert "same subfolders (cat, dog)" in folder_layout([*cameras], cameras.__getitem__).reason
    inside = {"bottle": ["train", "test"], "cable": ["test", "train"]}
    assert folder_layout([*inside], inside.__getitem__).kind == "unclear"
