"""Blocks that keep attention, chosen on the way."""

import json
import signal

import pytest
from safetensors.torch import load_file
from timm.layers import Attention

from gspn2convert.errors import UserError
from gspn2convert.held_out import HeldOut
from gspn2convert.interrupt import Interrupted
from gspn2convert.keep import Auto
from gspn2convert.mixer import Gspn2Mixer
from helpers.conversions import Pictures, create, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = {"keep": Auto(count=1)}


@pytest.fixture
def deep(make_teacher):
    """A teacher of four blocks, so that there is something to choose."""
    vit = make_teacher(depth=4)
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    return vit


def test_blocks_are_chosen_before_stage_2(run, deep, tmp_path):
    metrics = run(vit=deep, **AUTO)
    found = metrics["selection"]
    assert found["keep"] == "auto:1"
    assert [each["after"] for each in found["passes"]] == ["fit", "align"]
    for each in found["passes"]:
        assert [one["layer"] for one in each["layers"]] == [0, 1, 2, 3]
        assert each["chosen"] == each["order"] == [min(each["layers"], key=lambda one: one["kl"])["layer"]]
        assert [one["set"] for one in each["sets"]] == ["none", "chosen", "evenly spaced", "last"]
        assert all(one.keys() == {"set", "layers", "divergence", "kl", "retention"} for one in each["sets"])
    assert found["kept"] == metrics["kept_layers"] == found["passes"][1]["chosen"]
    stages = {stage["stage"]: stage for stage in metrics["stages"]}
    assert list(stages) == ["fit", "align", "select", "recover"]
    # All twelve held-out images were looked at, so the figures are those of the stages.
    for stage, each, number in (("fit", 0, 0), ("align", 1, 0), ("select", 1, 1)):
        one = found["passes"][each]["sets"][number]
        assert stages[stage]["cosine"] == pytest.approx(1 - one["divergence"], abs=1e-6)
        assert stages[stage]["agreement"] == pytest.approx(one["retention"], abs=1e-6)
    saved = create(tmp_path / "out")
    kinds = [Attention if i in found["kept"] else Gspn2Mixer for i in range(4)]
    assert [type(block.attn) for block in saved.blocks] == kinds
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["selection"] == found
    assert run(vit=deep, output=tmp_path / "again", **AUTO)["selection"] == found


def test_the_hybrid_of_the_fit_has_its_mixers(run, deep, tmp_path):
    chosen = run(vit=deep, stages=(0,), output=tmp_path / "chosen", **AUTO)
    (only,) = chosen["selection"]["passes"]
    (kept,) = only["chosen"]
    assert (only["after"], chosen["kept_layers"]) == ("fit", [kept])
    run(vit=deep, stages=(0,), output=tmp_path / "given", keep=(kept,))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("chosen", "given")]
    assert same_bits(*weights)


READ_BEFORE_RECOVER = 12 + 32 + 8 + 6 * 4


def test_a_choice_outlives_a_stop_in_stage_2(run, deep, tmp_path):
    undisturbed = run(vit=deep, output=tmp_path / "undisturbed", **AUTO)
    with pytest.raises(Interrupted, match="stopped in stage recover after 2 of 6"):
        run(vit=deep, pictures=Pictures(terminate_at_read=READ_BEFORE_RECOVER + 4 + 1), **AUTO)
    with pytest.raises(UserError, match="started with different keep"):
        run(vit=deep, resume=True, keep=(undisturbed["kept_layers"][0],))
    resumed = run(vit=deep, resume=True, **AUTO)
    assert resumed["selection"] == undisturbed["selection"]
    assert resumed["kept_layers"] == undisturbed["kept_layers"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("at", [2, 9], ids=["after the fit", "after align"])
def test_a_choice_that_was_stopped_is_made_again(run, deep, tmp_path, monkeypatch, at):
    undisturbed = run(vit=deep, output=tmp_path / "undisturbed", **AUTO)
    compare, calls = HeldOut.compare, []

    def stopping(self, student, **how):
        calls.extend([1] * bool(how))
        if how and len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return compare(self, student, **how)

    monkeypatch.setattr(HeldOut, "compare", stopping)
    with pytest.raises(Interrupted, match="stopped in stage select after . of 7; resume to begin this stage again"):
        run(vit=deep, **AUTO)
    resumed = run(vit=deep, resume=True, **AUTO)
    assert resumed["selection"] == undisturbed["selection"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert weights[0] == weights[1]


def test_more_blocks_than_there_are_cannot_be_chosen(run, tmp_path):
    with pytest.raises(UserError, match="keep 'auto:2': expected 1 to 1, for the teacher has 2 blocks"):
        run(keep=Auto(count=2))
    assert not (tmp_path / "out").exists()
