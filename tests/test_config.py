"""Settings: who overrides whom, and one clear sentence for each that cannot be."""

from __future__ import annotations

import functools

import pytest

import config as settings
from config import (
    Config,
    ConfigError,
    Run,
    Train,
    build_config,
    differences,
    keys,
    read_yaml,
    to_dict,
)
from settings import assign

OWN = {"*": {"train.lr": 0.5, "train.epochs": 77}, "mock": {"train.epochs": 88}}
PRESET = {Config().run.model: OWN, "sasrec": OWN}  # the model of a run that names none, and another


@pytest.fixture
def presets(monkeypatch):
    monkeypatch.setattr(settings, "MODEL_PRESETS", PRESET)
    monkeypatch.setattr(settings, "DATASET_PRESETS", {"mock": {"train.lr": 0.25, "data.k_core": 3}})
    modes = {"quick": {"train.epochs": 2}, "baseline": {"train.epochs": 3, "train.clip": 9}}
    monkeypatch.setattr(settings, "MODE_DEFAULTS", modes)


def test_defaults_without_any_wish():
    assert differences(Config()) == {}
    assert (
        to_dict(build_config({"run.model": "no preset"}))["sasrec"] == to_dict(Config())["sasrec"]
    )


def test_presets_beat_defaults(presets):
    config = build_config({"run.mode": "baseline"})
    assert config.train.epochs == 88, "the preset for this data set beats the one for all"
    assert config.train.lr == 0.5, "the model's preset beats the data set's"
    assert config.data.k_core == 3
    other = build_config({"run.mode": "baseline", "data.dataset": "some/folder/beauty"})
    assert other.train.epochs == 77 and other.data.k_core == 0


def test_the_mode_beats_presets_in_quick_only(presets):
    assert build_config({"run.mode": "quick"}).train.epochs == 2
    baseline = build_config({"run.mode": "baseline"})
    assert baseline.train.epochs == 88 and baseline.train.clip == 9


@pytest.mark.parametrize("mode", ["quick", "baseline"])
def test_yaml_beats_presets_and_flags_beat_yaml(presets, mode):
    overlay = {"train.epochs": 5, "train.lr": 0.1}
    config = build_config({"run.mode": mode, "train.lr": 0.2}, overlay)
    assert config.train.epochs == 5 and config.train.lr == 0.2


def test_the_presets_of_a_model_in_a_list(presets):
    asked = {"run.model": "rpg,sasrec", "run.mode": "baseline"}
    assert build_config(asked).train.epochs == 3
    config = build_config(asked, model="sasrec")
    assert config.train.epochs == 88 and config.run.model == "sasrec"


def test_an_edition_has_the_presets_of_its_folder(monkeypatch, tmp_path):
    wanted = build_config(
        {"data.dataset": "data/movielens/ml-1m", "run.model": "pmat"}
    ).pmat.dropout
    asked = {"data.dataset": "movielens", "run.model": "pmat"}
    assert build_config(asked).pmat.dropout != wanted
    assert build_config(asked | {"data.edition": "ml-1m"}).pmat.dropout == wanted
    assert build_config(asked | {"data.edition": "ml-10m"}).data.k_core == 5
    (tmp_path / "ml-1m").mkdir()
    monkeypatch.chdir(tmp_path / "ml-1m")
    assert build_config(asked | {"data.dataset": "."}).pmat.dropout == wanted


def test_every_preset_is_valid():
    for model, by_data in settings.MODEL_PRESETS.items():
        for name in by_data:
            build_config({"run.model": model, "data.dataset": name, "run.mode": "baseline"})
    for name in settings.DATASET_PRESETS:
        build_config({"data.dataset": f"data/{name}"})


@pytest.mark.parametrize(
    ("section", "wrong", "said"),
    [
        (Run, {"mode": "quik"}, "config.py: run.mode is one of"),
        (Train, {"epochs": -1}, "config.py: train.epochs lies between"),
        (Train, {"lr": "fast"}, "config.py: train.lr wants a number"),
    ],
)
def test_a_default_edited_in_config_py_is_held_to_its_limits(monkeypatch, section, wrong, said):
    name = section.__name__.lower()
    edited = functools.partial(Config, **{name: section(**wrong)})
    monkeypatch.setattr(settings, "Config", edited)
    with pytest.raises(ConfigError, match=said):
        build_config()


def test_no_seed_beyond_the_last():
    build_config({"run.seed": 2**31 - 2, "run.seeds": 2})
    with pytest.raises(ConfigError, match="no seed may be above"):
        build_config({"run.seed": 2**31 - 2, "run.seeds": 3})


def test_every_setting_says_what_it_is():
    assert all(leaf.metadata.get("help") for leaf in keys(Config()).values())


# --------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.learning_rate", 1, "no setting 'train.learning_rate'"),
        ("train.ephocs", 1, "Did you mean 'train.epochs'"),
        ("width", 64, "Did you mean"),
        ("train", 5, "no setting 'train'"),
        ("train.epochs", "ten", "wants a whole number, not 'ten'"),
        ("train.epochs", 2.5, "wants a whole number"),
        ("train.epochs", True, "wants a whole number"),
        ("train.epochs", None, "wants a whole number"),
        ("train.epochs", 10**400, "lies between"),
        ("train.epochs", -1, "lies between 0 and"),
        ("train.lr", "nan", "wants a number"),
        ("train.lr", "inf", "wants a number"),
        ("train.lr", [0.1], "wants a number"),
        ("train.lr", -0.1, "lies between"),
        ("train.mask_seen", "perhaps", "wants true or false"),
        ("train.schedule", "cosin", "Did you mean 'cosine'"),
        ("run.mode", "quik", "Did you mean 'quick'"),
        ("run.mode", ["quick"], "wants text"),
        ("run.model", 3, "wants text"),
        ("train.amp", True, "train.amp is one of auto, bf16, fp16, off, not 'on'"),
        ("mock.dims", {}, "at least one modality"),
        ("mock.dims", "{text: [", "wants a mapping"),
        ("mock.dims", "48", "wants a mapping"),
        ("mock.dims", "{1: 4, 2: 4}", "1 is no name"),
        ("mock.dims", "{text: 2020-13-45}", "wants a mapping"),  # an impossible date
        ("mock.dims", "{text: wide}", "mock.dims: text wants a width"),
        ("mock.dims", {"text": 0}, "mock.dims: text wants a width"),
        ("mock.history_max", 4, "smaller than mock.history_min"),
        ("sasrec.heads", 3, "no multiple of sasrec.heads"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(key, value, said):
    for flags, overlay in (({key: value}, {}), ({}, {key: value})):
        with pytest.raises(ConfigError) as refusal:
            build_config(flags, overlay)
        assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.lr", "1e-3", 1e-3),
        ("train.lr", "1", 1.0),
        ("train.epochs", "3.0", 3),
        ("train.mask_seen", "No", False),
        ("train.compile", 1, True),
        ("mock.dims", "{text: 4, audio: 2}", {"text": 4, "audio": 2}),
        ("train.amp", False, "off"),  # what YAML makes of off
    ],
)
def test_text_becomes_the_type_of_the_setting(key, text, value):
    section, leaf = key.split(".")
    found = getattr(getattr(build_config({key: text}), section), leaf)
    assert found == value and type(found) is type(value)


# --------------------------------------------------------------------------- yaml


def test_sections_and_dotted_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {lr: 1e-3, epochs: 4}\nmock.dims: {text: 8}\n")
    flat = read_yaml(str(path))
    assert flat == {"train.lr": "1e-3", "train.epochs": 4, "mock.dims": {"text": 8}}
    assert build_config(overlay=flat).train.lr == 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"train: {lr: [", "line 1 is not YAML"),
        (b"train:\n  lr: 1\n bad\n", "is not YAML"),
        (b"train: {lr: 1}\ntrain: {clip: 2}\n", "line 2 is not YAML: 'train' is there twice"),
        (b"- 1\n- 2\n", "expected sections"),
        (b"", "expected sections"),
        (b"just words", "expected sections"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"train: {lr: 2020-13-45}", "is not YAML: month must be in 1..12"),
        (b"a: !!python/object/apply:os.system ['true']", "is not YAML"),
        (b"train: {lr: 99}", "bad.yaml: train.lr lies between"),
        (b"train: {lrr: 1}", "bad.yaml: there is no setting 'train.lrr'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, said):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        read_yaml(str(path))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read_yaml(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read_yaml(str(tmp_path))


def test_a_float_whose_default_is_written_as_a_whole_number_stays_a_float():
    config = Config()
    config.sasrec.dropout = 0
    assign(config, "sasrec.dropout", "0.2", "--set")
    assert config.sasrec.dropout == 0.2
    with pytest.raises(ConfigError, match="whole number"):
        assign(config, "sasrec.layers", "1.5", "--set")
