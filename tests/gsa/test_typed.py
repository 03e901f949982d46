"""Values are of their settings' types: numbers are read alike everywhere, and text stays as it was written."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from gsa.config import TrainConfig, build, load_config, lookup, read_yaml, to_yaml
from gsa.errors import ConfigError, RequestError
from gsa.plain import dump, parse
from gsa.schema import all_keys, declared
from ray_jobs.sweep import SweepConfig, read_sweep

RATE, DECAY = "training.optimizer.learning_rate", "training.optimizer.weight_decay"
LAYERS, NAME = "model.num_layers", "data.corpus.revision"
# as written, and what it is to a setting of a number with a fraction and of a whole one; None is refused
NUMBERS: list[tuple[str, float | None, int | None]] = [
    ("1e-3", 0.001, None),
    ("1E-3", 0.001, None),
    ("1.5e+1", 15.0, 15),
    ("1e2", 100.0, 100),
    (".5", 0.5, None),
    ("2.", 2.0, 2),
    ("3", 3.0, 3),
    ("+3", 3.0, 3),
    ("007", 7.0, 7),
    ("0x10", 16.0, 16),
    ("0o10", 8.0, 8),
    ("'3'", 3.0, 3),
    ("1_000", None, None),
    ("1:30", None, None),
    ("2026-11-28", None, None),
    ("true", None, None),
    ("", None, None),
    ("~", None, None),
    ("three", None, None),
]
WRITTEN = [
    "007", "1.10", "2026_11_28", "2026-11-28", "20261128", "1e3", "0x10", "1_0", "on", "yes", "no", "off", "true",
    "True", "FALSE", "y", "1:30", ".5", "0b1", "+1", "-1",
]  # fmt: skip


def value_of(schema: type[Any], key: str, override: str) -> Any:
    return lookup(build(schema, {}, [override]), key)


@pytest.mark.parametrize(("written", "fraction", "whole"), NUMBERS)
def test_a_number_is_read_alike_in_files_overrides_and_spaces(
    tmp_path: Path, written: str, fraction: float | None, whole: int | None
) -> None:
    path = tmp_path / "run.yaml"
    for key, wanted in ((RATE, fraction), (LAYERS, whole)):
        *above, last = key.split(".")
        path.write_text("".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(above)) + f"    {last}: {written}\n")
        if wanted is None:
            for refusing in (lambda k=key: build(TrainConfig, {}, [f"{k}={written}"]), lambda: load_config(path)):
                with pytest.raises(ConfigError, match=key):
                    refusing()
            continue
        for found in (value_of(TrainConfig, key, f"{key}={written}"), lookup(load_config(path), key)):
            assert found == wanted
            assert type(found) is type(wanted)
    if fraction is not None and "'" not in written:
        space = f"{{{RATE}: {{type: float, low: 1e-9, high: {written}}}}}"
        assert value_of(SweepConfig, "space", f"space={space}")[RATE]["high"] == fraction
        space = f"{{{RATE}: {{type: categorical, choices: [{written}]}}}}"
        (choice,) = value_of(SweepConfig, "space", f"space={space}")[RATE]["choices"]
        assert (choice, type(choice)) == (fraction, float)


def test_text_is_kept_as_it_was_written(tmp_path: Path) -> None:
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    for written in WRITTEN:
        path.write_text(f"data: {{corpus: {{revision: {written}}}}}\n")
        assert load_config(path).data.corpus.revision == written
    listed = f"[{', '.join(WRITTEN)}]"
    path.write_text(f"data: {{corpus: {{files: {listed}}}}}\n")
    for config in (load_config(path), build(TrainConfig, {}, [f"data.corpus.files={listed}"])):
        assert config.data.corpus.files == WRITTEN
        again.write_text(to_yaml(config))
        assert load_config(again) == config


def test_a_sweeps_name_prices_choices_and_conditions_are_kept_as_written(tmp_path: Path) -> None:
    for written in set(WRITTEN) - {".5", "1:30", "+1"}:  # which no name may be
        assert build(SweepConfig, {}, [f"name={written}"]).name == written
    path, listed = tmp_path / "007.yaml", f"[{', '.join(WRITTEN)}]"
    dimension = f"{{type: categorical, choices: {listed}}}"
    conditions = [f"{{type: float, low: 1e-4, high: 1e-2, when: {{{NAME}: {one}}}}}" for one in (listed, "1.10")]
    prices = ", ".join(f"{written}: 2" for written in WRITTEN)
    path.write_text(
        f"budget: {{prices: {{{prices}}}}}\n"
        f"space: {{{NAME}: {dimension}, {RATE}: {conditions[0]}, {DECAY}: {conditions[1]}}}\n"
    )
    config = read_sweep(path)
    for _ in range(2):  # what is read from the sweep's own folder is the same
        assert config.name == "007"
        assert config.space[NAME]["choices"] == WRITTEN
        assert config.space[RATE]["when"] == {NAME: WRITTEN}
        assert config.space[DECAY]["when"] == {NAME: "1.10"}
        assert config.budget.prices == dict.fromkeys(WRITTEN, 2.0)
        path.write_text(to_yaml(config))
        assert read_sweep(path) == config
        config = read_sweep(path)


def test_null_is_null_where_it_is_allowed_and_text_elsewhere() -> None:
    for written in ("null", "~", "Null", ""):
        assert build(TrainConfig, {}, [f"{NAME}={written}"]).data.corpus.revision is None
        assert build(TrainConfig, {}, [f"model.layers[0].k={written}"]).model.layers[0].k is None
    assert build(TrainConfig, {}, [f"{NAME}='null'"]).data.corpus.revision == "null"
    assert build(TrainConfig, {}, ["name=null", "storage=~"]).name == "null"
    for key in ("name", "storage", "tracking.experiment"):
        with pytest.raises(ConfigError, match="must be text"):
            build(TrainConfig, {}, [f"{key}="])


def test_booleans_are_those_of_both_yamls_and_nothing_else() -> None:
    for written, wanted in (("true", True), ("Yes", True), ("on", True), ("FALSE", False), ("no", False)):
        assert build(TrainConfig, {}, [f"training.compile={written}"]).training.compile is wanted
    for written in ("1", "0", "2", "maybe", "'yes'", "[]", "~"):
        with pytest.raises(ConfigError, match=r"training\.compile = .*: must be true or false"):
            build(TrainConfig, {}, [f"training.compile={written}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"seed={2**64}", f"seed = {2**64}: must be <= {2**64 - 1}"),
        ("seed=-1", "must be >= 0"),
        (f"training.batch_size={2**63}", f"must be <= {2**63 - 1}"),
        ("training.batch_size=1e30", f"must be <= {2**63 - 1}"),
        (f"model.layers[0].k=-{2**63}", "must be"),
        ("training.optimizer.learning_rate=1e400", "must be a finite number"),
        (f"training.optimizer.learning_rate=1{'0' * 99}", ""),
        (f"model.layers[{'9' * 5000}].k=3", "must be"),
    ],
)
def test_numbers_beyond_what_machines_take_are_refused(override: str, words: str) -> None:
    if not words:
        build(TrainConfig, {}, [override])
        return
    with pytest.raises(ConfigError) as refused:
        build(TrainConfig, {}, [override])
    assert words in str(refused.value)


def test_every_whole_number_is_bounded_and_every_seed_that_confirmations_make_too() -> None:
    for key in all_keys(SweepConfig):
        field, hint = declared(SweepConfig, key)
        if int in (hint, *getattr(hint, "__args__", ())) and ".layers." not in key and ".stages." not in key:
            with pytest.raises(ConfigError, match=f"{key} = {2**64}"):
                build(SweepConfig, {}, [f"{key}={2**64}"])
            assert field.metadata["bounds"]
    largest = [f"train.seed={2**64 - 1}", "confirm.seeds=3"]
    build(SweepConfig, {}, largest)
    with pytest.raises(ConfigError, match=r"train\.seed = .*confirm adds up to 3"):
        build(SweepConfig, {}, [*largest, "confirm.best=1"])


WRONG = [
    "text", "1.5", "3", "true", "null", "[[a]]", "[{a: 1}]", ".nan", "${seed}", "'${oc.env:HOME}'", "???", "[???]",
    "!!binary aGk=", "{}",
]  # fmt: skip


@pytest.mark.parametrize("schema", [TrainConfig, SweepConfig])
@pytest.mark.slow
def test_whatever_a_setting_is_given_it_is_taken_or_refused_in_our_own_words(schema: type[Any]) -> None:
    """In one line that names the key."""
    sections = {key.rsplit(".", i)[0] for key in all_keys(schema) for i in range(1, 4)}
    refusals = 0
    for key, written in itertools.product([*all_keys(schema), *sorted(sections)], WRONG):
        if schema is SweepConfig and key.startswith("train."):
            continue  # the same as of the other
        given = key.replace(".layers.", ".layers[0].").replace(".stages.", ".stages[0].")
        given = given.replace("objectives.", "objectives[0].").replace("constraints.", "constraints[0].")
        try:
            build(schema, {}, [f"{given}={written}"])
        except RequestError as error:
            refusals += 1
            said = str(error)
            assert "\n" not in said, said
            assert key.split(".")[0] in said.split(":")[0], (given, written, said)
            for word in (
                "Omega",
                "DictConfig",
                "ListConfig",
                "Value '",
                "full_key",
                "structured",
                "reference_type",
                "nterpol",
            ):
                assert word not in said, said
    assert refusals > len(all_keys(schema)) if schema is TrainConfig else 100


@pytest.mark.parametrize(
    ("schema", "override", "words"),
    [
        (TrainConfig, "learning_rate=1", "learning_rate: no such setting; did you mean '" + RATE + "'?"),
        (SweepConfig, "learning_rate=1", f"did you mean 'train.{RATE}'?"),
        (SweepConfig, f"{RATE}=1", f"did you mean 'train.{RATE}'?"),
        (TrainConfig, "learnin_rate=1", f"did you mean '{RATE}'?"),
        (TrainConfig, "optimizer.learning_rate=1", f"did you mean '{RATE}'?"),
        (TrainConfig, "traning.batch_size=1", "did you mean 'training.batch_size'?"),
        (TrainConfig, "layers[*].controller.k=5", "did you mean 'model.layers[*].k'?"),
        (TrainConfig, "model.layers[2].attention.selection.share=5", "did you mean 'model.layers[2].share'?"),
        (SweepConfig, "model.layers[first].k=5", "did you mean 'train.model.layers[first].k'?"),
        (TrainConfig, "optimizer={}", "did you mean 'training.optimizer'?"),
        (TrainConfig, "model.num_layer=1", "did you mean 'num_layers'?"),
        (TrainConfig, "precision=1", "did you mean 'training.precision'?"),
        (TrainConfig, "nothing_like_it=1", "known here: name, storage, seed, model"),
    ],
)
def test_a_key_that_is_near_one_is_answered_with_it(schema: type[Any], override: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        build(schema, {}, [override])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {}\nspace: {}\n", "is a sweep's configuration (it has 'train'): gsa sweep "),
        ("num_layers: 2\nattention: {}\n", "is a model's configuration (it has 'num_layers'): model: {include: "),
    ],
)
def test_a_file_of_another_kind_given_to_train_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "file.yaml").write_text(content)
    with pytest.raises(RequestError) as refused:
        load_config(tmp_path / "file.yaml")
    assert words in str(refused.value)


def test_a_file_of_another_kind_given_to_sweep_is_named(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "configs"
    for name, words in (("train/tiny.yaml", "is a training run's configuration (it has 'model'): gsa train "),
                        ("model/tiny.yaml", "is a model's configuration (it has 'num_layers')")):  # fmt: skip
        with pytest.raises(RequestError) as refused:
            read_sweep(root / name)
        assert words in str(refused.value)
    with pytest.raises(RequestError, match="is a sweep's configuration"):
        load_config(root / "sweep/quickstart.yaml")


def test_what_is_dumped_reads_as_it_was_whoever_reads_it() -> None:
    import yaml

    data = {"a": [*WRITTEN, "null", "~", "", "=", "<<", "a: b", "é"], "b": [1e-5, 1e22, 3, True, None, math.inf]}
    assert parse(dump(data)) == data
    assert yaml.safe_load(dump(data)) == data


def test_values_that_are_read_keep_what_was_written_until_their_settings_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: 007\nseed: 007\n")
    assert read_yaml(tmp_path / "a.yaml") == {"name": "007", "seed": "007"}
    config = load_config(tmp_path / "a.yaml")
    assert (config.name, config.seed) == ("007", 7)
