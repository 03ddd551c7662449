from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.synthetic.registry import MAGNITUDE_REGISTRY

from sae_gated_plugin.config import check
from sae_gated_plugin.config.check import convert_value
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.config.yaml import read_yaml
from sae_gated_plugin.errors import ConfigError, SaeGatedError, UnknownArchitecture
from sae_gated_plugin.synthetic.config import Training

MINIMAL = """\
dataset_path: text
training_tokens: 2e6
lr: 3e-4
n_batches_in_buffer: 64
seqpos_slice: [1, null]
sae:
  architecture: gated
  d_in: 8
  d_sae: 16
  l1_coefficient: 2
logger:
  log_to_wandb: false
"""


def minimal() -> dict[str, Any]:
    return yaml.safe_load(MINIMAL.replace("2e6", "2000000").replace("3e-4", "0.0003"))


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_builds_saelens_own_configuration(write: Any) -> None:
    config = load_config(write(MINIMAL))
    runner = config.runner
    assert isinstance(runner, LanguageModelSAERunnerConfig)
    assert type(runner.sae) is SAE_TRAINING_CLASS_REGISTRY["gated"][1]
    assert (runner.sae.d_in, runner.sae.d_sae, runner.sae.l1_coefficient) == (8, 16, 2.0)
    assert (runner.training_tokens, runner.lr) == (2_000_000, 3e-4)
    assert isinstance(runner.training_tokens, int)
    assert runner.seqpos_slice == (1, None)
    assert runner.logger.log_to_wandb is False
    assert runner.context_size == LanguageModelSAERunnerConfig.context_size  # SAELens's default


def test_every_default_of_saelens_is_accepted(write: Any) -> None:
    """But for n_batches_in_buffer, with whose default SAELens's own defaults do not train."""
    defaults = load_config(write(MINIMAL)).runner
    for prefix, config in (("", defaults), ("sae.", defaults.sae), ("logger.", LoggingConfig())):
        for field in dataclasses.fields(config):
            value = field.default
            if field.name in ("dataset_path", "n_batches_in_buffer"):
                continue
            if not isinstance(value, str | int | float | tuple):
                continue
            text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value)
            text = text.removesuffix("...\n").strip()
            loaded = load_config(write(MINIMAL), [f"{prefix}{field.name}={text}"]).runner
            section = getattr(loaded, prefix.removesuffix(".")) if prefix else loaded
            if field.name != "checkpoint_path":  # SAELens appends a random id
                assert getattr(section, field.name) == value, field.name


def test_overrides_are_yaml_and_the_last_one_wins(write: Any) -> None:
    overrides = ["lr=1e-2", "sae.l1_coefficient=5", "lr=4.0e-3", "hook_name=model.layers.2"]
    overrides += ["exclude_special_tokens=[0, 3]", "model_from_pretrained_kwargs.gguf_file=a.gguf"]
    config = load_config(write(MINIMAL), overrides)
    assert config.runner.lr == 4e-3
    assert config.runner.sae.l1_coefficient == 5.0
    assert config.runner.hook_name == "model.layers.2"
    assert config.runner.exclude_special_tokens == [0, 3]
    assert config.runner.model_from_pretrained_kwargs == {"gguf_file": "a.gguf"}
    assert config.mapping["lr"] == 4e-3
    assert config.mapping["sae"]["architecture"] == "gated"


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"dataset_path": "~/text", "model_name": "~/model", "output_path": "~/run"}
    config = load_config({**minimal(), **given})
    runner = config.runner
    assert [runner.dataset_path, runner.model_name] == ["/home/me/text", "/home/me/model"]
    assert runner.output_path == config.with_output("~/run").runner.output_path == "/home/me/run"
    assert config.mapping["dataset_path"] == "~/text"  # as it was given
    for nobodys in ("~no-such-user/model", "~0"):
        assert load_config({**minimal(), "model_name": nobodys}).runner.model_name == nobodys


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_device_is_what_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    runner = load_config(minimal()).runner
    assert (runner.device, runner.llm_device, runner.act_store_device) == (device,) * 3
    given = load_config(minimal(), ["llm_device=cuda:1", "device=cpu"]).runner
    assert (given.device, given.llm_device) == ("cpu", "cuda:1")  # what is given stays


def test_overrides_change_the_architecture(write: Any) -> None:
    runner = load_config(write(MINIMAL), ["sae.architecture=standard"]).runner
    assert runner.sae.architecture() == "standard"


def test_run_yaml_repeats_the_run(write: Any, tmp_path: Path) -> None:
    overrides = ["lr=1e-05", "logger.run_name='3e-4'", "model_name=on", "seed=7"]
    first = load_config(write(MINIMAL), overrides)
    again = load_config(write(first.to_yaml()))
    assert again.mapping == first.mapping
    assert again.runner.logger.run_name == "3e-4"
    assert again.runner.model_name == "on"
    checkpoint_paths = {first.runner.checkpoint_path, again.runner.checkpoint_path}
    assert len(checkpoint_paths) == 2  # SAELens makes them unique
    first.runner.checkpoint_path = again.runner.checkpoint_path
    assert again.runner.to_dict() == first.runner.to_dict()


def test_output_folder_holds_the_checkpoints_and_the_original_is_unchanged(write: Any) -> None:
    config = load_config(write(MINIMAL))
    moved = config.with_output("somewhere/run")
    assert moved.runner.output_path == "somewhere/run"
    assert moved.runner.checkpoint_path == str(Path("somewhere/run/checkpoints"))
    assert moved.mapping["output_path"] == "somewhere/run"
    assert config.runner.output_path == "output"
    assert "output_path" not in config.mapping


def test_a_mapping_is_not_changed() -> None:
    mapping = minimal()
    before = yaml.safe_dump(mapping)
    load_config(mapping, ["sae.d_sae=32", "logger.wandb_project=x"])
    assert yaml.safe_dump(mapping) == before


def test_yaml_reads_as_version_1_2(write: Any) -> None:
    text = "a: on\nb: 1e3\nc: 010\nd: 2024-01-01\ne: 1_000\nf: ~\ng: 'true'\nh: 1:30\ni: -.5\n"
    assert read_yaml(write(text)) == {
        "a": "on",
        "b": 1000.0,
        "c": 10.0,
        "d": "2024-01-01",
        "e": 1000,
        "f": None,
        "g": "true",
        "h": "1:30",
        "i": -0.5,
    }


BAD_OVERRIDES = [
    ("lrr=1", "Unknown key 'lrr' in the override 'lrr=1'. Did you mean 'lr'?"),
    ("sae.l1_coeficient=1", "Did you mean 'sae.l1_coefficient'?"),
    ("sae.k=3", "Unknown key 'sae.k' of architecture 'gated' in the override 'sae.k=3'."),
    ("logger.wandb_projekt=x", "Did you mean 'logger.wandb_project'?"),
    (
        "sae.target_l0=17",
        "in the override 'sae.target_l0=17' is 17.0, more than d_sae = 16.",
    ),
    ("sae.metadata={a: 1}", "Unknown key 'sae.metadata'"),
    ("lr=fast", "'lr' in the override 'lr=fast' must be a finite number, not 'fast'."),
    ("lr='3e-4'", "must be a finite number, not '3e-4'."),
    ("lr=.nan", "must be a finite number, not nan."),
    ("lr=true", "must be a finite number, not True."),
    ("lr=-1", "'lr' in the override 'lr=-1' must be above zero, not -1."),
    ("sae.d_sae=0", "must be above zero, not 0."),
    ("sae.d_in=true", "must be a whole number, not True."),
    ("sae.d_in=7.5", "must be a whole number, not 7.5."),
    ("streaming=1", "must be true or false, not 1."),
    ("model_name=3", "must be text, not 3."),
    ("hook_head_index=x", "must be a whole number or null, not 'x'."),
    ("seqpos_slice=3", "must be a list of whole numbers or nulls, not 3."),
    ("sae.resample_steps=500", "must be a list of whole numbers, not 500."),
    ("sae.resample_steps=[0.5]", "must be a list of whole numbers, not [0.5]."),
    ("exclude_special_tokens=x", "must be true or false or a list of whole numbers, not 'x'."),
    ("seqpos_slice=[9, 5]", "empty range"),
    ("dtype=float33", "must be one of 'float32', "),
    ("sae.normalize_activations=no", "'constant_norm_rescale', 'layer_norm'"),
    ("lr_scheduler_name=linear", "must be one of 'constant', 'cosineannealing'"),
    ("sequence_separator_token=cls", "or one of 'bos', 'eos', 'sep' or null, not 'cls'."),
    ("context_size=-5", "must be above zero"),
    ("model_kwargs=3", "must be a mapping, not 3."),
    ("sae=3", "'sae' in the override 'sae=3' must be a mapping, not 3."),
    ("lr.x=3", "Override 'lr.x=3': 'lr' is a single value, not a mapping."),
    ("lr", "Override 'lr' is not of the form key=value."),
    ("=3", "Override '=3' is not of the form key=value."),
    ("sae..d_in=3", "is not of the form key=value."),
    ("lr=[1", "The value of override 'lr=[1' is not valid YAML at line 1"),
    ("dataset_path=null", "'dataset_path' in the override 'dataset_path=null' must be text"),
    ("dataset_path=''", "'dataset_path' is missing"),
    ("n_batches_in_buffer=9", "9 × 127 is smaller than train_batch_size_tokens = 4096"),
    ("prefetch_llm_batches=-1", "prefetch_llm_batches must be a bool or a non-negative int"),
    ("lr=!!python/object:os.system x", "is not valid YAML"),
]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (tuple[int, ...], "a list of whole numbers"),
        (list[str] | None, "a list of texts or null"),
        (list[dict[str, int]], "a list of mappings"),
        (list[list[float]], "a list of lists of finite numbers"),
        (list[Literal["a", "b"]], "a list of values out of 'a', 'b'"),
    ],
)
def test_a_type_in_words(hint: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_value(hint, 3, "'x'")
    assert str(caught.value) == f"'x' must be {words}, not 3."


@pytest.mark.parametrize(("override", "sentence"), BAD_OVERRIDES)
def test_bad_overrides(write: Any, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(MINIMAL), [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    (MINIMAL + "lrr: 1\n", "Unknown key 'lrr' in '{path}'. Did you mean 'lr'?"),
    (MINIMAL + "lr: 1\n", "'{path}' is not valid YAML at line 13, column 1: the key 'lr' appears"),
    (MINIMAL + "  bad: [1,\n", "'{path}' is not valid YAML at line 14, column 1"),
    (
        MINIMAL.replace("  d_in: 8\n", ""),
        "'sae.d_in' of architecture 'gated' is missing in '{path}'.",
    ),
    (MINIMAL.replace("  architecture: gated\n", ""), "'sae.architecture' is missing in '{path}'."),
    (MINIMAL.replace("dataset_path: text\n", ""), "'dataset_path' is missing in '{path}'."),
    ("lr: 1\n", "'{path}' has no 'sae' section"),
    ("", "'{path}' must hold a mapping of keys to values; it holds nothing."),
    ("- lr\n", "it holds a list."),
    (MINIMAL + "1: x\n", "Unknown key '1'"),
    (MINIMAL + "sweep: {}\n", "'{path}' has a section 'sweep', which a single run has not; start"),
    (
        "saes: []\nsae: {}\n",
        "section 'saes', which a single run has not; start it with: sae-gated synth",
    ),
    (MINIMAL + "? [a, b]\n: x\n", "is not valid YAML"),
    (MINIMAL + "model_kwargs: &x {a: *x}\n", "line 13, column 22: aliases (*x) and tags (!x)"),
    (MINIMAL + "hook_name: !!str 3\n", "line 13, column 12: aliases (*x) and tags (!x) are not"),
    (MINIMAL + f"model_kwargs: {'[' * 50}\n", "it may hold 10,000 values on 50 levels"),
    (f"a: [{'x, ' * 10_000}]", "it may hold 10,000 values on 50 levels, and holds more."),
    ("a: x\n" * 2**15, "'{path}' has 163,840 characters; 131,072 are allowed."),
    (MINIMAL + "seed: " + "9" * 5000, "is not valid YAML: ValueError: Exceeds the limit"),
    ("\x00", "'{path}' is not valid YAML"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES)
def test_bad_files(write: Any, text: str, sentence: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert sentence.replace("{path}", str(path)) in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["gatd", "[gated]", "3"])
def test_unknown_architecture(write: Any, name: str) -> None:
    with pytest.raises(UnknownArchitecture, match=r"Unknown architecture .* known: .*gated") as e:
        load_config(write(MINIMAL), [f"sae.architecture={name}"])
    assert isinstance(e.value, SaeGatedError)
    if name == "gatd":
        assert "Did you mean 'gated'?" in str(e.value)


def test_what_has_a_range_exists() -> None:
    classes = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values()]
    classes += [LanguageModelSAERunnerConfig, LoggingConfig, Training]
    classes += MAGNITUDE_REGISTRY.values()
    fields = {field.name for config in classes for field in dataclasses.fields(config)}
    for _, _, names in check._RANGES:
        assert fields.issuperset(names), names
    assert fields.issuperset(check._DEVICES)
