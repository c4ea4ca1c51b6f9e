"""A whole conversion of a stream goes on where it stopped."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn2convert.data import open_images
from gspn2convert.demo_data import FILE as DEMO_IMAGES
from gspn2convert.distill import Options, distill
from gspn2convert.errors import UserError
from gspn2convert.interrupt import Interrupted
from gspn2convert.stream import Row
from helpers.pictures import encode
from helpers.streams import COLUMNS, DEMO, write_parquet

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Converts the bundled teacher on 200 of the bundled images, streamed; SIGTERM as the n-th image is read."""
    with np.load(DEMO_IMAGES, allow_pickle=False) as arrays:
        for split, count in (("train", 200), ("test", 40)):
            pixels, labels = (arrays[f"{split}_{kind}"][:count] for kind in ("images", "labels"))
            names = open_images("demo", split, in_chans=1).label_names
            columns = COLUMNS | {"kind": datasets.ClassLabel(names=names)}
            contents = [encode(Image.fromarray(one)) for one in pixels]
            for part in range(2):
                half = slice(part * count // 2, (part + 1) * count // 2)
                file = tmp_path / "demo" / f"{split}-{part}.parquet"
                write_parquet(file, contents[half], labels[half].tolist(), columns)
    monkeypatch.setattr("gspn2convert.stream.WINDOW", 32)
    opened, read = Row.open, []

    def go(name: str, *, terminate_at_read: int | None = None, **options):
        read.clear()

        def open_and_count(row: Row):
            read.append(row.index)
            if len(read) == terminate_at_read:
                signal.raise_signal(signal.SIGTERM)
            return opened(row)

        monkeypatch.setattr(Row, "open", open_and_count)
        how = Options(output=tmp_path / name, device="cpu", quiet=True, **options)
        metrics = distill("demo", DEMO, f"hfids/demo:{tmp_path / 'demo'}", how)
        return metrics, load_file(tmp_path / name / "model.safetensors"), list(read)

    return go


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(convert) -> None:
    metrics, whole, read = convert("whole")
    assert metrics["teacher_top1"] > 0.8
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "align", "recover"]
    # 32 images are held out, 48 and then 16 of those held out are for the fit, the 40 test images for its top-1.
    assert read[:136] == [*range(32), *range(32, 80), *range(0, 32, 2), *range(40)]
    align, recover = read[136 : 136 + 4 * 24], read[136 + 4 * 24 + 40 :][: 9 * 24]
    assert set(align) | set(recover[:168]) == set(range(32, 200)), "all but the images that are held out"
    assert sorted(recover[:168]) == list(range(32, 200))
    eighth = 136 + 4 * 24 + 40 + 7 * 24  # of the steps of `recover`, the first in the second epoch
    with pytest.raises(Interrupted, match="stopped in stage recover after 8 of 9"):
        convert("stopped", terminate_at_read=eighth + 1)
    resumed, weights, again = convert("stopped", resume=True)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    figures = [[{**stage, "seconds": 0} for stage in one["stages"]] for one in (metrics, resumed)]
    assert figures[0] == figures[1]
    assert again == [*range(32), *read[eighth + 24 :]]


def test_a_stream_is_not_cached(convert, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^data 'hfids/demo:.*' is a stream, which --cache cannot hold"):
        convert("cached", cached=True)
    assert not (tmp_path / "cached").exists()
