"""Scores of features against numbers by hand, brute force and closed forms in numpy."""

import math

import numpy as np
import pytest
import torch

from gspn2convert.probes import (
    COMMON_NEIGHBOURS_IMAGES,
    Cka,
    CosineSummary,
    knn_accuracy,
    linear_accuracy,
    neighbour_agreement,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn(channels, seed=0):
    """An orthogonal matrix."""
    return torch.linalg.qr(draw(channels, channels, seed=seed).double()).Q.float()


def on_circle(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_cosines_have_the_mean_and_percentile_of_the_angles():
    # 200 angles; 5 % of them, the 10 widest, are 90 to 81 degrees.
    angles = torch.cat([torch.arange(81.0, 91.0), torch.linspace(0, 60, 190)]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    summary = CosineSummary()
    for part in vectors.split(70):
        summary.add(part[None], torch.tensor([2.0, 0.0]).expand(1, len(part), 2))
    found = summary.summary()
    assert found["mean"] == pytest.approx(angles.cos().mean().item(), abs=1e-6)
    assert found["p5"] == pytest.approx(math.cos(math.radians(81)), abs=1e-4)


def test_cosines_reach_both_ends():
    summary = CosineSummary()
    summary.add(torch.ones(1, 1, 3), torch.ones(1, 1, 3))
    assert summary.summary() == {"mean": pytest.approx(1.0), "p5": pytest.approx(1.0, abs=1e-4)}
    summary.add(torch.ones(1, 1, 3), -torch.ones(1, 1, 3))
    assert summary.summary() == {"mean": pytest.approx(0.0, abs=1e-7), "p5": pytest.approx(-1.0, abs=1e-4)}


def test_nearest_neighbours_vote_by_their_cosine():
    train, labels = on_circle(10.0, 40.0, -40.0, 44.0), torch.tensor([0, 1, 1, 1])
    # At 0 degrees exp(cos 10 / .07) = 1.3e6 stands against 2 exp(cos 40 / .07) + exp(cos 44 / .07) = 1.4e5, so the
    # one near neighbour wins. At 26 degrees it is 9.2e5 against 2 near ones (9.2e5 and 7.6e5), so the many win.
    query = on_circle(0.0, 26.0)
    assert knn_accuracy(train, labels, query, torch.tensor([0, 1])) == 1.0
    assert knn_accuracy(train, labels, query, torch.tensor([1, 1])) == 0.5
    assert knn_accuracy(train, labels, query, torch.tensor([1, 0])) == 0.0


def test_only_twenty_neighbours_vote():
    # 20 of class 0 at 50 degrees; 200 of class 1 at 52 degrees would outvote them if all were asked.
    train = on_circle(*[50.0] * 20, *[52.0] * 200)
    labels = torch.tensor([0] * 20 + [1] * 200)
    assert knn_accuracy(train, labels, on_circle(0.0), torch.tensor([0])) == 1.0


def knn_one_by_one(train, labels, test):
    """What each test vector is taken for, with loops over Python numbers."""
    train, test = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (train.numpy(), test.numpy()))
    answers = []
    for one in test:
        nearest = sorted(((float(one @ other), label) for other, label in zip(train, labels.tolist(), strict=True)))[
            -20:
        ]
        votes = {}
        for cosine, label in nearest:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / 0.07)
        answers.append(max(votes, key=votes.get))
    return torch.tensor(answers)


def test_knn_is_that_of_brute_force_for_vectors_of_any_length():
    labels, asked = torch.arange(300) % 4, torch.arange(1100) % 4  # more than one chunk
    centres = draw(4, 6, seed=1)
    train, test = centres[labels] + draw(300, 6, seed=2), centres[asked] + draw(1100, 6, seed=3)
    expected = (knn_one_by_one(train, labels, test) == asked).double().mean().item()
    assert 0.4 < expected < 0.99
    assert knn_accuracy(train, labels, test, asked) == pytest.approx(expected)
    lengths = draw(1100, 1, seed=4).exp()
    assert knn_accuracy(train, labels, test * lengths, asked) == pytest.approx(expected)


def ridge_in_numpy(train, labels, classes, strength):
    """A function from features to guesses: the closed form on standardised features, with its intercept."""
    mean, deviation = train.mean(0), train.std(0)
    inputs = (train - mean) / deviation
    targets = np.eye(classes)[labels]
    gram = inputs.T @ inputs
    penalty = strength * np.trace(gram) / len(gram) * np.eye(len(gram))
    # As least squares of a taller system: the penalty is more rows, the intercept one more column without penalty.
    tall = np.block([[inputs, np.ones((len(inputs), 1))], [np.linalg.cholesky(penalty).T, np.zeros((len(gram), 1))]])
    weights = np.linalg.lstsq(tall, np.vstack([targets, np.zeros((len(gram), classes))]), rcond=None)[0]
    return lambda test: (((test - mean) / deviation) @ weights[:-1] + weights[-1]).argmax(1)


def linear_in_numpy(train, labels, test, asked):
    train, labels, test, asked = (one.double().numpy() for one in (train, labels, test, asked))
    labels = labels.astype(int)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).numpy()
    held, kept = np.split(order, [len(order) // 10])
    classes, best, most = int(max(labels.max(), asked.max())) + 1, None, -1.0
    for strength in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0):
        share = (ridge_in_numpy(train[kept], labels[kept], classes, strength)(train[held]) == labels[held]).mean()
        if share >= most:
            best, most = strength, share
    return best, (ridge_in_numpy(train, labels, classes, best)(test) == asked).mean()


@pytest.mark.parametrize(
    ("count", "noise", "chosen"),
    [
        (1500, 6.0, 10.0),  # more than one chunk of images
        (60, 8.0, 1.0),  # few images for so many channels
    ],
)
def test_linear_probe_is_the_closed_form(count, noise, chosen):
    labels, asked = torch.arange(count) % 5, torch.arange(1300) % 5
    centres, sizes = 2 * draw(5, 40, seed=1), draw(40, seed=5).exp()
    train, test = (
        (centres[rows] + noise * draw(len(rows), 40, seed=seed)) * sizes + 7 for rows, seed in ((labels, 2), (asked, 3))
    )
    strength, expected = linear_in_numpy(train, labels, test, asked)
    assert strength == chosen
    assert 0.4 < expected < 0.98
    assert linear_accuracy(train, labels, test, asked) == pytest.approx(expected)
    # Standardised, so neither units nor offsets of the channels count.
    assert linear_accuracy(train * 3 - 1, labels, test * 3 - 1, asked) == pytest.approx(expected, abs=2 / 1300)


def test_linear_probe_learns_what_is_linear_whatever_the_order():
    features, asked = draw(400, 3, seed=1), draw(200, 3, seed=2)
    labels, truth = ((one @ torch.tensor([1.0, -2.0, 0.5]) > 0).long() for one in (features, asked))
    order = labels.argsort()  # as folders are: all of one class, then all of the other
    assert linear_accuracy(features[order], labels[order], asked, truth) > 0.97
    # A class of the test images that no training image has is never guessed.
    assert linear_accuracy(features, labels, asked, torch.full((200,), 2)) == 0.0


def test_test_images_decide_nothing_in_the_linear_probe():
    labels, asked = torch.arange(100) % 3, torch.arange(90) % 3
    train, test = draw(3, 8, seed=1)[labels] + draw(100, 8, seed=2), draw(3, 8, seed=1)[asked] + draw(90, 8, seed=3)
    whole = linear_accuracy(train, labels, test, asked)
    parts = [linear_accuracy(train, labels, test[i : i + 1], asked[i : i + 1]) for i in range(90)]
    assert whole == pytest.approx(sum(parts) / 90)


def test_constant_channels_do_not_disturb_the_linear_probe():
    features, asked = draw(300, 3, seed=1), draw(100, 3, seed=2)
    labels, truth = ((one[:, 0] > 0).long() for one in (features, asked))
    plain = linear_accuracy(features, labels, asked, truth)
    padded = (torch.cat([one, torch.full((len(one), 2), 0.1)], dim=1) for one in (features, asked))
    wide = linear_accuracy(next(padded), labels, next(padded), truth)
    assert plain > 0.95
    assert wide == pytest.approx(plain, abs=0.02)
    # Where all are constant, the most frequent class is all that is known.
    guess = linear_accuracy(
        torch.ones(30, 4), torch.tensor([0] * 11 + [1] * 19), torch.ones(10, 4), torch.arange(10) % 2
    )
    assert guess == 0.5


def common_one_by_one(ours, theirs):
    """Neighbours in common, with loops."""
    shares = []
    for i in range(len(ours)):
        sets = []
        for one in (ours, theirs):
            cosines = [float(torch.cosine_similarity(one[i], other, dim=0)) for other in one]
            others = sorted((j for j in range(len(one)) if j != i), key=lambda j, found=cosines: -found[j])
            sets.append(set(others[:10]))
        shares.append(len(sets[0] & sets[1]) / 10)
    return sum(shares) / len(shares)


def test_common_neighbours_are_those_of_loops():
    ours = draw(40, 8)
    theirs = torch.cat([ours[:, :5], draw(40, 4, seed=1)], dim=1)
    expected = common_one_by_one(ours, theirs)
    assert 0.3 < expected < 0.9
    assert neighbour_agreement(ours, theirs) == pytest.approx(expected)
    assert neighbour_agreement(theirs, ours) == pytest.approx(expected)


def test_common_neighbours_of_one_space_and_of_two():
    # Were an image its own neighbour, one of ten would always be in common.
    features = draw(1200, 16)  # more than one chunk
    assert neighbour_agreement(features, 3 * features[:, torch.randperm(16)]) == pytest.approx(1.0, abs=1e-3)
    # The chance of each of the 10 is 10 / 1199; the standard error over 12,000 is 0.0008.
    assert neighbour_agreement(features, draw(1200, 16, seed=1)) == pytest.approx(10 / 1199, abs=0.004)
    # Among eleven images the ten others are everybody's neighbours.
    assert neighbour_agreement(draw(11, 4), draw(11, 4, seed=1)) == 1.0


def test_of_very_many_images_some_from_all_over_are_compared(monkeypatch):
    monkeypatch.setattr("gspn2convert.probes.COMMON_NEIGHBOURS_IMAGES", 50)
    ours, theirs = draw(200, 6), draw(200, 6, seed=1)
    ours[::4] = theirs[::4]
    assert neighbour_agreement(ours, theirs) == 1.0
    assert COMMON_NEIGHBOURS_IMAGES == 20_000


def cka(ours, theirs, part=64):
    sums = Cka()
    for rows in zip(ours.split(part), theirs.split(part), strict=True):
        sums.add(*rows)
    return sums.value()


def cka_in_numpy(ours, theirs):
    """Through the kernels of the tokens, (M, M), not the channels."""
    kernels = []
    for one in (ours, theirs):
        centred = one.double().numpy() - one.double().numpy().mean(0)
        kernels.append(centred @ centred.T)
    first, second = kernels
    return (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_cka_is_that_of_the_kernels(shift):
    ours = draw(300, 12) * draw(12, seed=1) + shift * draw(12, seed=2)
    theirs = ours @ draw(12, 7, seed=3) + 3 * draw(300, 7, seed=4)
    expected = cka_in_numpy(ours, theirs)
    assert 0.1 < expected < 0.95
    assert cka(ours, theirs) == pytest.approx(expected, abs=1e-9)
    assert cka(ours, theirs, part=300) == pytest.approx(expected, abs=1e-9)
    assert cka(theirs, ours) == pytest.approx(expected, abs=1e-9)


def test_cka_sees_neither_turns_nor_scale_nor_offset():
    ours = draw(300, 12) * draw(12, seed=1)
    assert cka(ours, -5 * ours @ turn(12) + 100) == pytest.approx(1.0, abs=1e-6)
    # Other scales of the channels among each other it does see.
    assert cka(ours, ours * draw(12, seed=2)) < 0.95


def test_cka_of_independent_features_is_near_0():
    # Its mean for white noise is about C / M.
    assert cka(draw(20_000, 8), draw(20_000, 8, seed=1), part=5000) < 0.002


def test_cka_of_constant_features_is_0():
    constant = torch.full((100, 3), 0.1)
    assert cka(constant, draw(100, 5)) == cka(draw(100, 5), constant) == cka(constant, constant) == 0.0
