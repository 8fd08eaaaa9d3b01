"""Counts in messages."""

from ssl_vit.runtime.text import pluralize


def test_pluralize_uses_the_singular_for_one_only():
    assert [pluralize(count, "image") for count in (0, 1, 2, 2000)] == [
        "0 images",
        "1 image",
        "2 images",
        "2,000 images",
    ]
    assert pluralize(3, "class", "classes") == "3 classes"
