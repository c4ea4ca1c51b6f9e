"""The conversion as a whole: what it writes is what it made, and what it says is what can be measured again."""

import copy
import dataclasses
import json
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models import save_for_hf
from torch.nn.functional import cosine_similarity

import gspn2convert
from gspn2convert.artifact import origin
from gspn2convert.checkpoint import FILE_NAME, CheckpointStore
from gspn2convert.conversion import Conversion
from gspn2convert.convert import convert, own_parameters
from gspn2convert.cost import count_parameters
from gspn2convert.data import split_held_out, train_batches
from gspn2convert.demo_data import FILE as DEMO_IMAGES
from gspn2convert.distill import Options, distill, distill_student
from gspn2convert.errors import UserError
from gspn2convert.held_out import HeldOut
from gspn2convert.images import ImageSet
from gspn2convert.interrupt import Interrupted
from gspn2convert.keep import Auto
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.progress import Progress
from gspn2convert.recipe import parse_recipe
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO_RECIPE = """
name: short
mixer: {proxy_dim: C/4}
fit: {images: 64, held_out: 64, batch_size: 32}
align: {steps: 10, batch_size: 16}
recover: {steps: 40, batch_size: 12, mixer_lr: 2.0e-4, lr: 5.0e-5, ema: 0.9}
augment: {scale: [0.7, 1.0], color_jitter: 0.0}
keep: "0,3,4"
eval_every: 20
held_out: 64
seed: 3
"""
RECIPE = """
name: tiny
mixer: {proxy_dim: 8}
fit: {images: 32, held_out: 8, batch_size: 8}
align: {steps: 6, batch_size: 4}
recover: {steps: 6, batch_size: 4, ema: 0.5}
eval_every: 4
held_out: 12
"""
FILES = ["README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"]
SIZE = (48, 32)  # of PIL: width first
LABELS = ("ant", "bee", "cat", "dog", "elk")


class Pictures:
    """Soft random pictures in memory, class after class, that note which of them are read."""

    def __init__(self, count=70, *, seed=0, labels=LABELS, broken=(), terminate_at_read=None):
        noise = np.random.default_rng(seed)
        small = [Image.fromarray(noise.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(count)]
        self.images = [image.resize(SIZE, Image.Resampling.BICUBIC) for image in small]
        self.label_names, self.broken, self.terminate_at_read = labels, broken, terminate_at_read
        self.read_in_order = []

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.read_in_order.append(index)
        if len(self.read_in_order) == self.terminate_at_read:
            signal.raise_signal(signal.SIGTERM)
        if index in self.broken:
            raise OSError("image file is truncated")
        return self.images[index], index * len(LABELS) // len(self.images)

    def where(self, index):
        return f"picture {index}"

    def pixels(self, indices, teacher):
        """The pictures as the teacher wants to see them, without the help of the toolkit."""
        cfg = teacher.pretrained_cfg
        values = torch.tensor(np.stack([np.asarray(self.images[i]) for i in indices])).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (values - mean) / std


@pytest.fixture
def teacher(make_teacher):
    """Takes the pictures as they are, without resizing."""
    vit = make_teacher()
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    return vit


@pytest.fixture
def run(teacher, tmp_path):
    """Converts the tiny teacher; `run(stages=(0,))`."""

    def go(recipe=RECIPE, *, pictures=None, test=None, keep=(), vit=teacher, output=tmp_path / "out", **options):
        sets = (ImageSet("pictures", pictures or Pictures()), ImageSet("test", test or Pictures(20, seed=1)))
        how = Options(output=output, device="cpu", quiet=True, **options)
        return distill_student(vit, parse_recipe(recipe, "test"), *sets, how, teacher_name="tiny", keep=keep)

    return go


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def create(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def compare(student, teacher, images):
    """Cosines of the final tokens and agreement, computed at once."""
    ours, theirs = (vit.forward_features(images) for vit in (student, teacher))
    cosines, prefix = cosine_similarity(ours.double(), theirs.double(), dim=-1), teacher.num_prefix_tokens
    figures = {"prefix_cosine": cosines[:, :prefix].mean().item(), "patch_cosine": cosines[:, prefix:].mean().item()}
    guesses = [vit(images).argmax(-1) for vit in (student, teacher)]
    agreement = (guesses[0] == guesses[1]).double().mean().item()
    return {**figures, "cosine": sum(figures.values()) / 2, "agreement": agreement}


def top1(model, images, labels):
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(-1) for part in images.split(100)])
    return (guesses == labels).double().mean().item()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The bundled teacher, its output folder and the metrics."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = Options(output=folder, device="cpu", quiet=True)
    metrics = distill("demo", parse_recipe(DEMO_RECIPE, "test"), "demo", options)
    return load_teacher("demo"), folder, metrics


@pytest.fixture(scope="module")
def demo_images():
    """The bundled images as the bundled teacher takes them, read without the toolkit."""
    with np.load(DEMO_IMAGES) as arrays:
        sets = {name: torch.tensor(arrays[name]) for name in arrays.files}
    for split in ("train", "test"):
        sets[f"{split}_images"] = (sets[f"{split}_images"].unsqueeze(1) / 255 - 0.286) / 0.353
    return sets


def test_each_stage_brings_the_student_nearer_to_its_teacher(demo):
    _, _, metrics = demo
    stages = metrics["stages"]
    assert [stage["stage"] for stage in stages] == ["fit", "align", "recover"]
    for key in ("cosine", "prefix_cosine", "patch_cosine"):
        assert stages[0][key] < stages[2][key] < 1
    assert stages[2]["cosine"] > stages[1]["cosine"]
    assert all(stage["seconds"] > 0 for stage in stages)


def test_scores_are_those_of_the_saved_model(demo, demo_images):
    teacher, folder, metrics = demo
    student, last = create(folder), metrics["stages"][-1]
    _, unseen = split_held_out(len(demo_images["train_images"]), 64, 3)
    expected = compare(student, teacher, demo_images["train_images"][unseen])
    assert {key: last[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    images, labels = demo_images["test_images"], demo_images["test_labels"].long()
    assert last["top1"] == pytest.approx(top1(student, images, labels), abs=2e-3)
    assert metrics["teacher_top1"] == pytest.approx(top1(teacher, images, labels), abs=2e-3)
    assert metrics["teacher_top1"] > 0.9


def test_metrics_say_what_was_done(demo):
    teacher, folder, metrics = demo
    student = create(folder)
    said = {key: metrics[key] for key in ("teacher", "recipe", "data", "seed", "stages_run", "kept_layers")}
    assert said == {
        "teacher": "demo",
        "recipe": "short",
        "data": "demo",
        "seed": 3,
        "stages_run": [0, 1, 2],
        "kept_layers": [0, 3, 4],
    }
    assert metrics["parameters"] == {"teacher": count_parameters(teacher), "student": count_parameters(student)}
    layers = metrics["layers"]
    assert [layer["layer"] for layer in layers] == [1, 2, 5]
    errors = [layer["errors"][layer["method"]] for layer in layers]
    assert errors == [min(layer["errors"].values()) for layer in layers]
    assert metrics["fit_error"] == pytest.approx(np.mean(errors))
    assert {"device", "torch", "timm", "python", "commit", "date"} <= set(metrics["environment"])


def test_history_records_losses_and_held_out_figures(demo):
    _, _, metrics = demo
    history = metrics["history"]
    assert [(record["stage"], record["step"], "evaluation" in record) for record in history] == [
        ("align", 10, False),
        ("align", 10, True),
        ("recover", 20, True),
        ("recover", 40, False),
        ("recover", 40, True),
    ]
    scores = {stage["stage"]: stage for stage in metrics["stages"]}
    for record in (history[1], history[4]):
        assert record["evaluation"].items() <= scores[record["stage"]].items()
    assert {"loss", "layer.1", "layer.2", "layer.5", "images_per_second"} <= set(history[0])
    assert history[3]["loss"] < history[2]["loss"]


def test_the_folder_is_complete(demo):
    _, folder, metrics = demo
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert parse_recipe((folder / "recipe.yaml").read_text(), "recipe.yaml") == parse_recipe(DEMO_RECIPE, "test")
    config = json.loads((folder / "config.json").read_text())
    told = {"version": gspn2convert.__version__, "teacher": "demo", "teacher_weights": origin(load_teacher("demo"))}
    assert config["gspn2"] == told | {"layers": [1, 2, 5], "depth": 6}
    assert "3 of 6 blocks: 1, 2, 5" in (folder / "README.md").read_text()


def test_what_is_saved_is_what_was_trained(teacher, tmp_path, run):
    """The stages once in memory and once into a folder."""
    metrics = run()
    recipe, out = parse_recipe(RECIPE, "test"), tmp_path / "in memory"
    with Progress(quiet=True) as progress:
        conversion = Conversion(
            teacher,
            recipe,
            ImageSet("pictures", Pictures()),
            ImageSet("test", Pictures(20, seed=1)),
            Options(output=out, device="cpu"),
            make_accelerator("cpu"),
            CheckpointStore(out, {}),
            progress,
        )
        student = conversion.stages(())
    test = Pictures(20, seed=1)
    images = test.pixels(range(20), teacher)
    saved = create(tmp_path / "out")
    assert same_bits(saved.state_dict(), student.state_dict())
    with torch.no_grad():
        assert torch.equal(saved(images), student(images))
    assert metrics["stages"][-1]["top1"] == top1(student, images, torch.arange(20) * 5 // 20)


def test_the_fit_is_convert_on_images_from_all_over_the_set(teacher, tmp_path, run):
    pictures = Pictures()
    metrics = run(stages=(0,), pictures=pictures)
    # 70 pictures: 12 held out and 32 of the other 58 for the fit; read again are 8 of those held out.
    train, unseen = split_held_out(70, 12, 0)
    read = pictures.read_in_order
    assert read[:12] == unseen
    calibration, judged = read[12:44], read[44:]
    assert len(set(calibration)) == 32
    assert set(calibration) <= set(train)
    assert len(set(judged)) == 8
    assert set(judged) <= set(unseen)
    # The set is in the order of its classes: none may be left out.
    for chosen, of in ((calibration, train), (judged, unseen)):
        for rank, index in enumerate(chosen):
            assert abs(rank / len(chosen) - of.index(index) / len(of)) < 1 / len(chosen)
    student, reports = convert(
        teacher,
        parse_recipe(RECIPE, "test"),
        pictures.pixels(calibration, teacher).split(8),
        pictures.pixels(judged, teacher).split(8),
    )
    saved = create(tmp_path / "out")
    assert [layer["method"] for layer in metrics["layers"]] == [report.method for report in reports]
    for layer, report in zip(metrics["layers"], reports, strict=True):
        assert layer["errors"] == pytest.approx(report.errors, rel=1e-4)
    with torch.no_grad():
        images = pictures.pixels(unseen, teacher)
        assert float((saved(images) - student(images)).abs().max()) < 1e-4
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit"]
    assert metrics["history"] == []


def test_fit_and_align_leave_what_is_inherited_untouched(teacher, tmp_path, run):
    run(stages=(0, 1), keep=(0,))
    ours, theirs = create(tmp_path / "out"), teacher.state_dict()
    assert [type(block.attn) for block in ours.blocks] == [Attention, Gspn2Mixer]
    state = ours.state_dict()
    for name, value in theirs.items():
        assert torch.equal(state[name.replace("blocks.1.attn.", "blocks.1.attn.prefix.")], value), name


def test_align_starts_from_the_fit(tmp_path, run):
    fit = run(stages=(0,), output=tmp_path / "fit")
    aligned = run(stages=(0, 1), output=tmp_path / "aligned")
    assert aligned["layers"] == fit["layers"]
    assert {**aligned["stages"][0], "seconds": 0} == {**fit["stages"][0], "seconds": 0}
    before, after = (
        torch.cat([value.flatten() for value in own_parameters(create(tmp_path / name).blocks[0].attn).values()])
        for name in ("fit", "aligned")
    )
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_without_the_fit_mixers_start_at_random(tmp_path, run):
    metrics = run(stages=(1, 2))
    assert metrics["stages_run"] == [1, 2]
    assert [(layer["method"], list(layer["errors"])) for layer in metrics["layers"]] == [("random", ["random"])] * 2
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "align", "recover"]
    fitted = run(output=tmp_path / "fitted")
    assert metrics["fit_error"] > 2 * fitted["fit_error"]
    assert metrics["stages"][-1]["cosine"] < fitted["stages"][-1]["cosine"]


def test_a_stage_without_steps_is_left_out(run):
    metrics = run(RECIPE.replace("align: {steps: 6", "align: {steps: 0"))
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "recover"]


@pytest.mark.parametrize(
    "kind",
    [
        {"class_token": False, "global_pool": "avg", "num_classes": 0},
        {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True},
        {"architecture": "deit_tiny_distilled_patch16_224"},
    ],
    ids=["no prefix, no head", "registers, LayerScale, qk-norm", "distilled"],
)
def test_other_kinds_of_teacher_go_the_whole_way(make_teacher, tmp_path, run, kind):
    vit, pictures = make_teacher(**kind), Pictures()
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    stages = run(vit=vit, pictures=pictures)["stages"]
    assert stages[2]["patch_cosine"] > 0.99
    assert ("prefix_cosine" in stages[2]) == (vit.num_prefix_tokens > 0)
    assert ("agreement" in stages[2]) == (stages[2]["top1"] is not None) == (vit.num_classes > 0)
    _, unseen = split_held_out(70, 12, 0)
    images, first = pictures.pixels(unseen, vit), vit.num_prefix_tokens
    with torch.no_grad():
        ours, theirs = (model.forward_features(images)[:, first:] for model in (create(tmp_path / "out"), vit))
    assert stages[2]["patch_cosine"] == pytest.approx(cosine_similarity(ours, theirs, dim=-1).mean().item(), abs=1e-5)


def test_augmented_views_are_those_of_each_stage_and_step(teacher, run):
    """Which pictures a stage sees depends on the seed and on the stage, and no held-out picture is among them."""
    pictures = Pictures()
    run(pictures=pictures)
    train, unseen = split_held_out(70, 12, 0)
    align, recover = pictures.read_in_order[-48:-24], pictures.read_in_order[-24:]
    assert align != recover
    assert not {*align, *recover} & set(unseen)
    recipe = parse_recipe(RECIPE, "test")
    config = {key: teacher.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    for seed, seen in enumerate((align, recover)):
        again = Pictures()
        views = train_batches(
            ImageSet("again", again),
            {**config, "input_size": (3, 32, 48)},
            indices=train,
            batch_size=4,
            augment=recipe.augment,
            seed=seed,
            first_step=0,
            steps=6,
        )
        assert len(list(views)) == 6
        assert again.read_in_order == seen


def test_pictures_without_labels_or_with_those_of_others_give_no_top1(run, tmp_path):
    for name, labels in (("none", None), ("others", ("one", "two"))):
        metrics = run(stages=(0,), test=Pictures(20, labels=labels), output=tmp_path / name)
        assert metrics["stages"][0]["top1"] is None
        assert metrics["teacher_top1"] is None
        assert 0 <= metrics["stages"][0]["agreement"] <= 1


def test_a_broken_picture_in_a_hundred_is_put_up_with(run, tmp_path, caplog):
    most = RECIPE.replace("images: 32", "images: 150")
    metrics = run(most, stages=(0,), pictures=Pictures(200, broken=(17,)))
    assert metrics["fit_error"] < 0.5
    assert "unreadable image, another one stands in for it: picture 17: image file is truncated" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    many = {"pictures": Pictures(200, broken=range(0, 200, 9)), "output": tmp_path / "many"}
    with pytest.raises(UserError, match="images are unreadable, more than the 1 %.*the first is picture"):
        run(most, **many)
    assert not (tmp_path / "many").exists()


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    before = snapshot(out)
    with pytest.raises(UserError, match="out is not empty; name another"):
        run()
    options = Options(output=out, device="cpu", quiet=True)
    with pytest.raises(UserError, match="out is not empty; name another"):
        distill("demo", parse_recipe(RECIPE, "test"), "demo", options)
    # Nor is it taken for a run that could go on.
    with pytest.raises(UserError, match="holds files, but no run to resume"):
        run(resume=True)
    assert snapshot(out) == before


def test_a_teachers_folder_is_not_taken_for_a_finished_run(run, tmp_path, teacher):
    save_for_hf(teacher, tmp_path / "out", safe_serialization=True)
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="holds files, but no run to resume"):
        run(resume=True)
    assert snapshot(tmp_path / "out") == before


def test_what_a_killed_write_leaves_is_no_obstacle(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{FILE_NAME}.part").write_bytes(b"half")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / f".{FILE_NAME}.part").write_bytes(b"half")
    run(stages=(0,))
    run(stages=(0,), resume=True, output=tmp_path / "again")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert same_bits(*weights)


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    metrics = run()
    before = snapshot(tmp_path / "out")
    pictures = Pictures()
    assert run(resume=True, pictures=pictures) == metrics
    assert snapshot(tmp_path / "out") == before
    assert pictures.read_in_order == []


def test_a_finished_run_of_something_else_is_not_taken_for_what_is_asked(run, teacher, tmp_path):
    run(stages=(0,))
    before = snapshot(tmp_path / "out")
    sets = {name: ImageSet(name, Pictures()) for name in ("pictures", "others")}
    how = Options(output=tmp_path / "out", device="cpu", quiet=True, stages=(0,), resume=True)
    asked = (("pictures", "small", "teacher tiny and not small"), ("others", "tiny", "data pictures and not others"))
    for images, name, words in asked:
        with pytest.raises(UserError, match=f"is finished, with {words}; name another folder, and to go on from this"):
            distill_student(
                *(teacher, parse_recipe(RECIPE, "test"), sets[images], sets["pictures"], how), teacher_name=name
            )
    assert snapshot(tmp_path / "out") == before


@pytest.fixture
def stopped(run, tmp_path):
    """The folder of a run that SIGTERM stopped in align."""
    with pytest.raises(Interrupted, match="stopped in stage align after 2 of 6; resume to go on"):
        run(pictures=Pictures(terminate_at_read=12 + 32 + 8 + 4 + 1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    return tmp_path / "out"


def test_a_stopped_run_goes_on_to_the_same_end(run, stopped, tmp_path):
    resumed = run(resume=True)
    undisturbed = run(output=tmp_path / "undisturbed")
    assert (stopped / "model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()
    for key in ("layers", "fit_error", "parameters"):
        assert resumed[key] == undisturbed[key]
    for ours, theirs in zip(resumed["stages"], undisturbed["stages"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert sorted(path.name for path in stopped.iterdir()) == FILES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": RECIPE.replace("ema: 0.5", "ema: 0.6")}, "recipe"),
        ({"recipe": RECIPE + "seed: 1"}, "recipe"),
        ({"keep": (0,)}, "keep"),
        ({"stages": (0, 1)}, "stages"),
        ({"precision": "bf16"}, "precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stopped_run_does_not_go_on_as_another(run, stopped, change, named):
    before = snapshot(stopped)
    with pytest.raises(UserError, match=f"started with another {named}; resume with what it was started with"):
        run(**{"resume": True, **change})
    assert snapshot(stopped) == before


def test_a_stopped_run_does_not_go_on_with_other_images_or_another_teacher(teacher, stopped):
    before = snapshot(stopped)
    sets = [ImageSet("others", Pictures()), ImageSet("test", Pictures(20, seed=1))]
    how = Options(output=stopped, device="cpu", quiet=True, resume=True)
    with pytest.raises(UserError, match="started with another data, teacher;"):
        distill_student(teacher, parse_recipe(RECIPE, "test"), *sets, how, teacher_name="another")
    changed = copy.deepcopy(teacher)
    changed.norm.bias.data[0] += 1e-3
    with pytest.raises(UserError, match="started with another data, teacher, teacher weights;"):
        distill_student(changed, parse_recipe(RECIPE, "test"), *sets, how, teacher_name="another")
    assert snapshot(stopped) == before


def test_a_stopped_run_is_not_overwritten_without_resume(run, stopped):
    before = snapshot(stopped)
    with pytest.raises(UserError, match="not empty; name another, or go on with a stopped run by --resume"):
        run()
    assert snapshot(stopped) == before


def test_a_damaged_checkpoint_is_named(run, stopped):
    path = stopped / FILE_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{FILE_NAME}: not a readable checkpoint"):
        run(resume=True)
    assert path.stat().st_size == 1000


def test_a_loss_that_becomes_nan_ends_the_command_and_keeps_the_checkpoint(run_cli, teacher, tmp_path):
    save_for_hf(teacher, tmp_path / "teacher", safe_serialization=True, model_args=teacher._model_args)
    for index, picture in enumerate(Pictures(30).images):
        (tmp_path / "data" / LABELS[index % 5]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / LABELS[index % 5] / f"{index}.png")
    (tmp_path / "nan.yaml").write_text(RECIPE.replace("ema: 0.5", "mixer_lr: 1.0e+20"))
    arguments = ("--recipe", tmp_path / "nan.yaml", "--data", tmp_path / "data", "--output", tmp_path / "out")
    result = run_cli("distill", "--teacher", tmp_path / "teacher", *arguments, "--device", "cpu")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert "at stage recover step" in last
    assert "the last good checkpoint (stage align, step 6) is kept; lower the learning rate" in last
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    weights = load_file(tmp_path / "out" / FILE_NAME)
    assert weights
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_keeping_every_block_leaves_nothing_to_do(run, tmp_path):
    with pytest.raises(UserError, match="every block keeps attention.*keep fewer"):
        run(keep=(0, 1))
    options = Options(output=tmp_path / "out", device="cpu")
    recipe = dataclasses.replace(parse_recipe(RECIPE, "test"), keep="every:1")
    with pytest.raises(UserError, match="keeps all 6 blocks"):
        distill("demo", recipe, "demo", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [("empty", "no .jpg, .jpeg or .png images in it"), ("nowhere", "no such file or folder"), ("one", "at least 2")],
)
def test_data_that_are_no_good(tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Pictures(1).images[0].save(tmp_path / "one" / "0.png")
    options = Options(output=tmp_path / "out", device="cpu", quiet=True)
    with pytest.raises(UserError, match=message):
        distill("demo", parse_recipe(RECIPE, "test"), str(tmp_path / data), options)
    assert not (tmp_path / "out").exists()


def test_pictures_none_of_which_can_be_read(run, tmp_path):
    with pytest.raises(UserError, match="images are unreadable, more than the 1 %.*the first is picture"):
        run(pictures=Pictures(broken=range(70)))
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match="started with another keep"):
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
