"""The verb `presets`: a table for people, JSON for programs."""

import json

from scaling_perception.cli import main
from scaling_perception.models.presets import preset_names
from scaling_perception.presets import COUNTS, count


def test_the_stored_counts_are_those_of_the_networks():
    stored = json.loads(COUNTS.read_text())
    counted = {name: count(name) for name in preset_names()}
    assert stored == counted, f"write this into {COUNTS}:\n{json.dumps(counted, indent=1)}"


def test_json_lists_every_preset_with_exact_numbers(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert tuple(rows) == preset_names()
    row = rows["XL/2"]
    assert (row["params"], row["active_params"], row["params_8ch"]) == (675129632, 675129632, 675148064)
    assert round(row["macs_256"] / 1e9, 2) == 118.62 and round(row["macs_512"] / 1e9, 2) == 524.54
    assert round(row["macs_256_8ch"] / 1e9, 2) == 118.63 and round(row["macs_512_8ch"] / 1e9, 2) == 524.56
    sizes = ("layers", "dim", "heads", "head_dim", "in_channels", "out_channels", "resolution")
    assert tuple(row[field] for field in sizes) == (28, 1152, 16, 72, 4, 8, 256)
    assert rows["mini"]["macs"] < rows["mini"]["macs_256"]


def test_table_is_aligned_and_complete(capsys):
    assert main(["presets"]) == 0
    text, note = capsys.readouterr().out.split("\n\n")
    head, *lines = text.splitlines()
    assert [line.split()[0] for line in lines] == list(preset_names())
    assert len({len(line) for line in [head, *lines]}) == 1
    assert "118.62" in text and "675.1 M" in text and "1.863 B" in text
    assert "1 MAC = 2 FLOPs" in note
