"""The rating sheet of docs/examples on images whose origin is known."""

import json
import re

import torch
from docs_examples import load

from lab.core.images import png
from lab.core.types import ImageGrid


def run_folder(folder):
    """A run whose immunized model draws black and whose baseline white images."""
    folder.mkdir()
    images = torch.zeros(2, 8, 3, 64, 64, dtype=torch.uint8)
    images[0] = 255
    rows = {
        "comparison_fox": (images, ("baseline, step 12", "immunized, step 12")),
        "generations_fox": (images[[0, 0, 1]], ("reference", "baseline", "immunized")),
    }
    listed = {}
    for name, (grid, labels) in rows.items():
        columns = tuple(str(i) for i in range(1, 9))
        (folder / f"{name}.png").write_bytes(png(ImageGrid(grid, labels, columns, "fox: images")))
        listed[name] = {"path": f"{name}.png", "caption": "fox: images"}
    (folder / "record.json").write_text(json.dumps({"content_hash": "1", "images": listed}))
    return folder


def test_answers_are_counted_for_the_right_model(tmp_path, capsys):
    run, sheet = run_folder(tmp_path / "run"), load("rating_sheet")
    pairs = sheet.read_pairs(run, 128)
    assert len(pairs) == 8
    assert {pair.sides[0] for pair in pairs} == {"baseline", "immunized"}  # in random order
    assert all(pair.images["baseline"].getextrema() == ((255, 255),) * 3 for pair in pairs)
    assert all(pair.images["immunized"].getextrema() == ((0, 0),) * 3 for pair in pairs)
    by_eye = {pair.key: ("left", "right")[pair.sides.index("baseline")] for pair in pairs}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(by_eye))
    capsys.readouterr()
    assert sheet.main([str(run), "--answers", *map(str, files)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"shown_baseline": 1.0, "shown_immunized": 0.0, "cohen_kappa": 1.0}


def test_the_sheet_is_blinded(tmp_path):
    run, sheet = run_folder(tmp_path / "run"), load("rating_sheet")
    assert sheet.main([str(run), str(tmp_path / "sheet.html")]) == 0
    page = (tmp_path / "sheet.html").read_text()
    assert len(set(re.findall(r'name="(comparison_fox/\d)"', page))) == 8
    assert "immunized" not in page
    assert "baseline" not in page
