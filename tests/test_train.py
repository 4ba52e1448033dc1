"""Networks that learn: their data, every gradient, the loop, and the command from end to end."""

import io
import json
import math
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from bench import show
from bench.__main__ import main
from bench.networks import get_network
from bench.train import data, loop, nets, plot, recipes
from bench.train.data import Dataset, Examples
from bench.train.layers import Conv1d, Conv2d, Flatten, Linear, MaxPool2d, Network, Parameter, ReLU
from bench.train.loop import Recipe, evaluate, train
from bench.train.optimiser import SGD, decay_in_steps
from fastconv import cross_entropy, grad
from tests.compare import assert_bounded, assert_exact

SHORT = Recipe(epochs=3, rate=0.05, halve_every=2)


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def mnist1d():
    return data.make_mnist1d(generator())


# Data ---------------------------------------------------------------------------------------------


def test_mnist1d_has_the_sizes_of_the_paper(mnist1d):
    assert mnist1d.training.inputs.shape == (4000, 1, 40)
    assert mnist1d.test.inputs.shape == (1000, 1, 40)
    assert {mnist1d.training.inputs.dtype, mnist1d.test.inputs.dtype} == {np.dtype("float32")}
    assert (len(mnist1d.training), len(mnist1d.test)) == (4000, 1000)


def test_mnist1d_is_balanced_mixed_and_normalised(mnist1d):
    parts = mnist1d.training, mnist1d.test
    assert np.bincount(np.concatenate([part.classes for part in parts])).tolist() == [500] * 10
    assert all(70 < count < 130 for count in np.bincount(mnist1d.test.classes))
    inputs = np.concatenate([part.inputs for part in parts]).astype(np.float64)
    assert abs(inputs.mean()) < 1e-6
    assert abs(inputs.std() - 1) < 1e-6


def test_a_seed_makes_the_same_data_and_another_seed_others(mnist1d):
    again, other = data.make_mnist1d(generator()), data.make_mnist1d(generator(1))
    for part in ("training", "test"):
        assert_exact(getattr(again, part).inputs, getattr(mnist1d, part).inputs)
        assert_exact(getattr(again, part).classes, getattr(mnist1d, part).classes)
    assert not np.array_equal(other.training.inputs, mnist1d.training.inputs)


def test_templates_start_and_end_on_the_line():
    assert data.TEMPLATES.shape == (10, 12)
    assert (data.TEMPLATES[:, [0, -1]] == 5).all()
    strokes = data._normalise_templates()
    assert (strokes[:, 0] == 0).all()
    assert_bounded(strokes.std(axis=1), np.full(10, 1 / 6), 1e-15)


def test_without_noise_an_example_is_its_template(monkeypatch, rng):
    """Stretched to 40 / (48 ... 72) of its 12 points, scaled by 0.8 ... 1.2, shifted, and 0 elsewhere."""
    for name in ("SMOOTH_NOISE", "WHITE_NOISE", "SHEAR"):
        monkeypatch.setattr(data, name, 0.0)
    stroke = np.repeat([1.0, 2.0], 6)
    examples = np.array([data._make_example(stroke, rng) for _ in range(400)])
    widths, tops = (examples > 0.5).sum(axis=1), examples.max(axis=1)
    assert set(widths) == {6, 7, 8, 9, 10, 11}
    assert 1.6 <= tops.min() < 1.62
    assert 2.38 < tops.max() <= 2.4
    steps = [example[example > 0.5] for example in examples]
    assert all(abs(step[1] - step.max() / 2) < 1e-12 < step[-3] - step[2] for step in steps)
    assert ((examples == 0) | (examples > 0)).all()
    starts = {int(np.argmax((example > 0.5) & (np.roll(example, 1) <= 0.5))) for example in examples}
    assert starts >= set(range(26))  # shifts of 0 ... 47 of 72 points


def test_the_longest_padding_stretches_nothing(monkeypatch, rng):
    changes = {"FEWEST_ZEROS": 60, "SHIFTS": 1, "SCALES": (1, 1)}
    for name, value in {**changes, "SMOOTH_NOISE": 0, "WHITE_NOISE": 0, "SHEAR": 0}.items():
        monkeypatch.setattr(data, name, value)
    stroke = rng.normal(size=12)
    expected = np.interp(np.arange(40) * 71 / 39, np.arange(72), [*stroke, *[0] * 60])
    assert_bounded(data._make_example(stroke, rng), expected, 1e-12)


def test_noise_and_shear_have_the_sizes_of_the_paper(rng):
    """Beside a stroke of zeros: waves of deviation 0.25 * sqrt(sum of squares of the filter), tilted."""
    examples = np.array([data._make_example(np.zeros(12), rng) for _ in range(4000)])
    ramp = np.linspace(-0.5, 0.5, 40)
    slopes = examples @ ramp / (ramp @ ramp)
    assert 0.2 < slopes.std() < 0.32  # of the shear alone 0.75 / sqrt(12) = 0.217
    level = examples - slopes[:, None] * ramp
    filtered = 0.25 / math.sqrt(2 * 2 * math.sqrt(math.pi))  # 0.094; the stroke has only the white noise
    assert 0.8 * filtered < level.std() < filtered
    neighbours = np.mean(level[:, 1:] * level[:, :-1]) / level.var()
    assert 0.6 < neighbours < 0.8  # exp(-1.82**2 / 16) = 0.81 of the waves, less by the white noise


def test_the_filter_is_gaussian_and_mirrored(rng):
    noise = rng.normal(size=72)
    mirrored = [*noise[::-1], *noise, *noise[::-1]]
    weights = [math.exp(-(k**2) / 8) for k in range(-8, 9)]
    expected = [
        sum(w * mirrored[72 + i + k] for k, w in zip(range(-8, 9), weights)) / sum(weights) for i in range(72)
    ]
    assert_bounded(data._smooth(noise), np.array(expected), 1e-14)


def test_digits_are_split_and_scaled():
    pytest.importorskip("sklearn", reason="it holds the digits")
    digits, again = data.load_digits(generator()), data.load_digits(generator())
    assert digits.training.inputs.shape == (1438, 1, 8, 8)
    assert digits.test.inputs.shape == (359, 1, 8, 8)
    assert digits.training.inputs.dtype == np.float32
    assert (digits.training.inputs.min(), digits.training.inputs.max()) == (-1, 1)
    assert_exact(again.test.inputs, digits.test.inputs)
    assert not np.array_equal(data.load_digits(generator(1)).test.inputs, digits.test.inputs)
    counts = np.bincount(np.concatenate([digits.training.classes, digits.test.classes]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_chosen_classes_are_renamed():
    examples = Examples(np.arange(6.0)[:, None], np.array([5, 3, 9, 4, 6, 5]))
    chosen = data.choose_classes(Dataset(examples, examples[:2]), 4, 6)
    assert chosen.training.inputs.ravel().tolist() == [0, 3, 4, 5]
    assert chosen.training.classes.tolist() == [1, 0, 2, 1]
    assert chosen.test.classes.tolist() == [1]


def test_batches_hold_every_example_once(rng):
    examples = Examples(np.arange(10)[:, None], np.arange(10))
    batches = list(examples.batches(4, rng))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    seen = np.concatenate([batch.classes for batch in batches])
    assert sorted(seen) == list(range(10))
    assert seen.tolist() != list(range(10))
    assert all((batch.inputs[:, 0] == batch.classes).all() for batch in batches)


# Gradients ----------------------------------------------------------------------------------------

LAYERS = {
    "conv1d": ((3, 2, 9), lambda rng: Conv1d(2, 4, 3, rng)),
    "conv1d_stride_2": ((3, 2, 10), lambda rng: Conv1d(2, 4, 3, rng, stride=2)),
    "conv1d_padding": ((2, 3, 7), lambda rng: Conv1d(3, 2, 5, rng, stride=2, padding=2)),
    "conv2d": ((2, 3, 6, 5), lambda rng: Conv2d(3, 4, 3, rng)),
    "conv2d_padding": ((2, 3, 6, 5), lambda rng: Conv2d(3, 2, 3, rng, stride=2, padding=1)),
    "linear": ((4, 6), lambda rng: Linear(6, 5, rng)),
    "relu": ((3, 4, 5), lambda rng: ReLU()),
    "max_pool2d": ((2, 3, 6, 4), lambda rng: MaxPool2d(2)),
    "flatten": ((2, 3, 4), lambda rng: Flatten()),
    "network": (
        (2, 1, 8, 8),
        lambda rng: Network([*nets.make_lenet_stages(rng)[0], Flatten(), Linear(512, 3, rng)]),
    ),
}


def differences(function, array, step=1e-6):
    """The gradient of a function of one array, which is changed in place: central differences."""
    gradient = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        value = array[place]
        array[place] = value + step
        above = function()
        array[place] = value - step
        below = function()
        array[place] = value
        gradient[place] = (above - below) / (2 * step)
    return gradient


def in_float64(layer):
    for parameter in layer.parameters():
        parameter.value = parameter.value.astype(np.float64)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name, rng):
    shape, make = LAYERS[name]
    layer, x = in_float64(make(rng)), rng.normal(size=shape)
    for parameter in layer.parameters():
        parameter.value += rng.normal(size=parameter.value.shape)  # the biases too
    direction = rng.normal(size=layer.forward(x).shape)

    def along():
        return float(np.sum(layer.forward(x) * direction))

    layer.forward(x)
    gradient = layer.backward(direction)
    parameters = [(parameter.gradient, parameter.value) for parameter in layer.parameters()]
    assert all(got.shape == value.shape for got, value in parameters)
    for got, array in [(gradient, x), *parameters]:
        assert_bounded(got, differences(along, array), 1e-6)


def test_gradient_of_the_loss(rng):
    scores, classes = rng.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    expected = differences(lambda: float(cross_entropy(scores, classes)), scores)
    assert_bounded(grad.cross_entropy_input(scores, classes), expected, 1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_float32(name, rng):
    shape, make = LAYERS[name]
    layer = make(rng)
    output = layer.forward(rng.normal(size=shape).astype(np.float32))
    assert output.dtype == np.float32
    assert layer.backward(output).dtype == np.float32
    assert all(p.value.dtype == p.gradient.dtype == np.float32 for p in layer.parameters())


# Networks -----------------------------------------------------------------------------------------


def test_the_convolutional_net_has_2050_parameters(rng):
    network = nets.make_convolutional(rng)
    assert network.count_parameters() == 60 + 690 + 690 + 610 == 2050
    assert sum(row.parameters for row in get_network("mnist1d").summary()) == 2050


def test_both_nets_have_the_same_hidden_units(rng):
    x = np.zeros((1, 1, 40), np.float32)
    units = []
    for network in (nets.make_convolutional(rng), nets.make_fully_connected(rng)):
        y, hidden = x, []
        for layer in network.layers:
            y = layer.forward(y)
            hidden += [y.size] if isinstance(layer, ReLU) else []
        assert y.shape == (1, 10)
        units.append(hidden)
    assert units == [[285, 135, 60]] * 2
    assert nets.make_fully_connected(rng).count_parameters() == 59_065


def test_weights_keep_the_deviation_of_what_they_pass(rng):
    layer = Linear(500, 500, rng)
    assert layer.weight.value.std() == pytest.approx(math.sqrt(2 / 500), rel=0.01)
    assert not layer.bias.value.any()
    assert Conv2d(30, 40, 3, rng).weight.value.std() == pytest.approx(math.sqrt(2 / 270), rel=0.03)


# The loop -----------------------------------------------------------------------------------------


def test_momentum():
    """Constant gradient 1, rate 0.5, momentum 0.5: velocities 1, 1.5, 1.75."""
    parameter = Parameter(np.array([8.0]))
    optimiser = SGD([parameter], momentum=0.5)
    values = []
    for _ in range(3):
        parameter.gradient = np.array([1.0])
        optimiser.step(rate=0.5)
        values.append(parameter.value.item())
    assert values == [7.5, 6.75, 5.875]


def test_the_rate_is_halved_after_every_so_many_epochs():
    assert [decay_in_steps(0.8, epoch, every=3) for epoch in range(1, 8)] == [0.8] * 3 + [0.4] * 3 + [0.2]


def test_the_loop_follows_its_recipe(monkeypatch, rng):
    rates = []

    class Recorded(SGD):
        def step(self, rate):
            rates.append(rate)
            super().step(rate)

    monkeypatch.setattr(loop, "SGD", Recorded)
    monkeypatch.setattr(loop, "evaluate", lambda network, examples: (0.0, float(len(rates))))
    examples = Examples(rng.normal(size=(10, 3)).astype(np.float32), rng.integers(2, size=10))
    lengths = []
    recipe = Recipe(epochs=5, rate=0.1, halve_every=2, measure_every=2, batch=4)
    curves = train(
        Network([Linear(3, 2, rng)]),
        Dataset(examples, examples),
        recipe,
        rng,
        lambda curves: lengths.append(len(curves.test.error)),
    )
    assert rates == [0.1] * 6 + [0.05] * 6 + [0.025] * 3  # three batches an epoch
    assert lengths == [1, 2, 2, 3, 4]
    assert curves.epochs == [0, 2, 4, 5]
    assert curves.training.error == curves.test.error == [0, 6, 12, 15]


def test_both_curves_are_of_their_own_data(rng):
    network = Network([Linear(3, 2, rng)])
    parts = [Examples(rng.normal(size=(9, 3)).astype(np.float32), rng.integers(2, size=9)) for _ in range(2)]
    recipe = Recipe(epochs=1, rate=0.0, halve_every=1)
    curves = train(network, Dataset(*parts), recipe, rng, lambda curves: None)
    for curve, part in zip((curves.training, curves.test), parts):
        assert (curve.loss[-1], curve.error[-1]) == evaluate(network, part)
    assert curves.training.loss != curves.test.loss


def test_evaluation():
    scores = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [3.0, 0.0]])
    loss, error = evaluate(Network([]), Examples(scores, np.array([0, 1, 0, 0])))
    assert error == 0.25
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert loss == pytest.approx((2 * right + wrong + math.log(1 + math.exp(-3))) / 4)


@pytest.mark.parametrize("make", [nets.make_convolutional, nets.make_fully_connected])
def test_a_few_epochs_reduce_the_loss_to_the_same_bits(make, mnist1d):
    few = Dataset(mnist1d.training[:500], mnist1d.test[:200])

    def learn():
        rng = generator(7)
        network = make(rng)
        curves = train(network, few, SHORT, rng, lambda curves: None)
        return curves, network

    (curves, network), (same_curves, same_network) = learn(), learn()
    assert curves.training.loss[-1] < 0.9 * curves.training.loss[0]
    assert (curves.training, curves.test) == (same_curves.training, same_curves.test)
    for parameter, same in zip(network.parameters(), same_network.parameters()):
        assert_exact(parameter.value, same.value)


def test_frozen_layers_are_left_as_they_were(monkeypatch, rng):
    """The head learns alone, then with the second convolution; the first one learns once."""
    trained = []

    def record(network, data, recipe, rng, after_epoch):
        trained.append((network.parameters(), data.training))
        return loop.Curves()

    images = Examples(rng.normal(size=(20, 1, 8, 8)).astype(np.float32), np.arange(20) % 10)
    monkeypatch.setattr(recipes, "load_digits", lambda rng: Dataset(images, images))
    monkeypatch.setattr(recipes, "train", record)
    course = recipes.Course(rng, None, lambda name, epochs: None)
    recipes.transfer_digits(course)
    (base, low), (head, high), (tuned, middle) = trained
    assert [len(low), len(high), len(middle)] == [10, 10, 10]
    assert not set(map(id, head)) & set(map(id, base))
    assert [id(p) for p in tuned] == [id(p) for p in (*base[2:4], *head)]
    assert high.inputs.shape == (10, 64, 2, 2)
    assert middle.inputs.shape == (10, 32, 4, 4)
    assert [each.frozen for each in course.trained] == [0, 320 + 18_496, 320]
    assert set(high.classes) == {0, 1, 2, 3, 4}
    assert recipes.FINE_TUNING.rate < recipes.DIGITS.rate


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A data set that is made in no time."""
    monkeypatch.setattr(data, "PER_CLASS", 30)
    monkeypatch.setattr(data, "TRAINING", 200)


def run(folder, *words, name="mnist1d"):
    """What a run of one epoch leaves of its curves."""
    assert main(["train", *words, "--epochs", "1", "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {f"train-{name}.json", f"train-{name}.svg"}
    return json.loads((folder / f"train-{name}.json").read_text())


def test_mnist1d_is_learned(small, tmp_path, capsys):
    found = run(tmp_path, "mnist1d")
    shown = capsys.readouterr().out
    assert "mnist1d, seed 0" in shown
    assert "1 of 600 epochs: not comparable" in shown
    assert "about 17%" not in shown
    assert found["command"].startswith("python -m bench train mnist1d --epochs 1")
    assert {"cpu", "threads", "versions", "commit", "dirty", "run"} <= set(found)
    convolutional, connected = found["networks"]
    assert (convolutional["parameters"], connected["parameters"]) == (2050, 59_065)
    assert convolutional["examples"] == [200, 100]
    assert convolutional["recipe"]["epochs"] == 1
    for part in ("training", "test"):
        for curve in convolutional["curves"][part].values():
            assert len(curve) == 2
        before, after = convolutional["curves"][part]["error"]
        assert f"{before:.1%} -> {after:.1%}" in shown


def test_a_narrow_terminal_loses_columns_and_breaks_no_cell(small, tmp_path, monkeypatch):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(show, "make_console", lambda: console)
    run(tmp_path, "mnist1d")
    lines = file.getvalue().splitlines()
    headings = next(line for line in lines if "published test error" in line)
    assert headings.split()[0] == "network"
    assert " test error" in headings
    assert "examples" not in headings
    for name in ("convolutional ", "fully connected "):
        row = lines[max(index for index, line in enumerate(lines) if line.startswith(f" {name}"))]
        assert "->" in row
        assert len(row) <= 80
    assert "no room for: examples, " in file.getvalue()


def test_the_plot_shows_both_curves_of_both_networks(small, tmp_path):
    found = run(tmp_path, "mnist1d")
    text = " ".join(ElementTree.parse(tmp_path / "train-mnist1d.svg").getroot().itertext())
    for each in found["networks"]:
        assert f"{each['name']}: {each['parameters']:,} parameters" in text
        for part in ("training", "test"):
            assert f"{part}, {100 * each['curves'][part]['error'][-1]:.1f} % in the end" in text
        assert "published test error" not in text  # after one epoch of 600


def test_each_training_is_announced_through_a_pipe(small, tmp_path, monkeypatch, capfd):
    seen = []

    def stop(*arguments):
        seen.append(capfd.readouterr().out)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(recipes, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "mnist1d")
    assert seen[0].endswith("training for 1 epochs: convolutional\n")
    assert seen[1].endswith("training for 1 epochs: fully connected\n")


@pytest.fixture
def brief(monkeypatch):
    """A recipe of two epochs."""
    monkeypatch.setattr(recipes, "MNIST1D", replace(recipes.MNIST1D, epochs=2, measure_every=1))


def test_published_errors_stand_beside_those_of_all_epochs(small, brief, tmp_path, capsys):
    assert main(["train", "mnist1d", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "about 17%" in shown
    assert "about 40%" in shown
    assert "not comparable" not in shown
    text = " ".join(ElementTree.parse(tmp_path / "train-mnist1d.svg").getroot().itertext())
    assert "published test error, 17 %" in text
    assert "published test error, 40 %" in text


def test_the_plot_holds_the_whole_curve(small, brief, tmp_path, monkeypatch):
    """Also the error before the first epoch, which is that of guessing."""
    kept = []
    monkeypatch.setattr(plot, "to_svg", lambda figure: kept.append(figure) or "")
    main(["train", "mnist1d", "--output", str(tmp_path)])
    for axis in kept[0].axes:
        low, high = axis.get_ylim()
        for line in axis.lines:
            assert low <= min(line.get_ydata()) <= max(line.get_ydata()) <= high
        assert all(tick == round(tick) for tick in axis.get_xticks())


def test_help_names_the_epochs_of_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{recipes.MNIST1D.epochs} with mnist1d, {recipes.DIGITS.epochs} with digits" in shown
    assert f"three times {recipes.FINE_TUNING.epochs}" in shown
    assert recipes.FINE_TUNING.epochs == recipes.DIGITS.epochs


def test_a_seed_decides_everything(small, tmp_path):
    def networks(*words):
        found = run(tmp_path, "mnist1d", *words)["networks"]
        for each in found:
            del each["curves"]["seconds"]
        return found

    assert networks() == networks("--seed", "0") != networks("--seed", "1")


def test_digits_are_learned(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="it holds the digits")
    (lenet,) = run(tmp_path, "digits", name="digits")["networks"]
    assert lenet["examples"] == [1438, 359]
    assert lenet["curves"]["test"]["error"][1] < 0.5 < lenet["curves"]["test"]["error"][0]
    assert "LeNet" in capsys.readouterr().out


def test_transfer_shows_three_accuracies(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="it holds the digits")
    found = run(tmp_path, "digits", "--transfer", name="digits-transfer")["networks"]
    shown = capsys.readouterr().out
    assert len(found) == 3
    for each in found:
        assert each["name"] in shown
        assert f"{1 - each['curves']['test']['error'][-1]:.1%}" in shown
    head, tuned = found[1:]
    assert head["curves"]["test"]["error"][-1] == tuned["curves"]["test"]["error"][0]  # it goes on from there


def test_an_interrupted_run_leaves_what_was_there(small, tmp_path, monkeypatch):
    before = run(tmp_path, "mnist1d")
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["train", "mnist1d", "--epochs", "2", "--seed", "1", "--output", str(tmp_path)])
    assert len(calls) == 5
    assert json.loads((tmp_path / "train-mnist1d.json").read_text()) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_transfer_needs_the_digits(tmp_path, capsys):
    assert main(["train", "mnist1d", "--transfer", "--output", str(tmp_path)]) == 2
    rule = "--transfer needs the data set digits, got mnist1d"
    assert capsys.readouterr().err == f"python -m bench: {rule}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transfer", [[], ["--transfer"]])
def test_missing_digits_are_named(tmp_path, monkeypatch, capsys, transfer):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it raises ModuleNotFoundError
    assert main(["train", "digits", *transfer, "--output", str(tmp_path)]) == 2
    rule = 'scikit-learn, which holds the digits, is not installed: pip install ".[bench]" in the checkout'
    assert capsys.readouterr().err == f"python -m bench: {rule}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cifar"], "invalid choice: 'cifar' (choose from"),
        ([], "the following arguments are required: data"),
        (["digits", "--epochs", "0"], "must be a whole number of at least 1, got '0'"),
        (["digits", "--seed", "-1"], "must be a whole number of at least 0, got '-1'"),
        (["digits", "--seed", "x"], "must be a whole number of at least 0, got 'x'"),
    ],
)
def test_bad_options_are_refused(capsys, words, reason):
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
