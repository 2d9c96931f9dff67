"""Names of concepts become parts of metric names."""

import pytest

from lab.core.slugs import slug


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stained glass", "stained_glass"),
        ("Café au lait", "cafe_au_lait"),
        ("\ufb01g 3", "fig_3"),
        ("+ !", ""),
        ("日本", ""),
    ],
)
def test_slugs(name, expected):
    assert slug(name) == expected
