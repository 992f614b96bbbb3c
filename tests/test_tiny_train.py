"""Training the bundled model: resumable to the bit, and what it writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from scc_fast.tiny import data, train

pytestmark = pytest.mark.slow  # together more than a minute

SETTINGS = (4, 4, 1e-3)  # steps, batch, peak learning rate


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train.train(*SETTINGS, tmp_path / "whole.pt").state_dict()
    generate, drawn = data.generate, []

    def interrupted(split, indices):
        if indices.start == 2 * SETTINGS[1]:
            raise KeyboardInterrupt
        return generate(split, indices)

    monkeypatch.setattr(data, "generate", interrupted)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train.train(*SETTINGS, checkpoint, save_every=0.0)
    monkeypatch.setattr(data, "generate", lambda s, i: (drawn.append(i.start), generate(s, i))[1])
    resumed = train.train(*SETTINGS, checkpoint, save_every=0.0).state_dict()
    assert drawn == [8, 12]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="remove it"):
        train.train(5, *SETTINGS[1:], checkpoint)


def test_the_shipped_files_are_what_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    train.cut_vocabulary()
    train.write_config()
    shipped = Path(data.__file__).parent / "assets"
    for name in ("merges.txt.gz", "open_clip_config.json"):
        unpack = gzip.decompress if name.endswith("gz") else bytes
        assert unpack((tmp_path / name).read_bytes()) == unpack((shipped / name).read_bytes())
    assert json.loads((shipped / "defaults.json").read_text())["flip"] is True
    sizes = {path.name: path.stat().st_size for path in shipped.rglob("*") if path.is_file()}
    assert sizes["open_clip_model.safetensors"] <= 8e6
    assert sum(size for name, size in sizes.items() if name.endswith(".png")) <= 6e6
    assert len(list((shipped / "samples").glob("*.png"))) >= 12
