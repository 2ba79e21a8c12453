"""Settings: YAML and flags in, YAML out, every problem in one go."""

import subprocess
import sys
import time

import pytest
import yaml
from conftest import PROJECT

from lora_sd.config import Config, config_from_values, parse_command_line, read_yaml, settings
from lora_sd.data.folder_options import FolderOptions
from lora_sd.errors import ConfigError


def parse(*argv):
    line = parse_command_line(argv, "train_sd_lora.py")
    return config_from_values(line.over(read_yaml(line.config_file) if line.config_file else {}))


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 7, batch_size: 3}")
    config = parse("--config", str(file), "--train.steps", "9")
    assert (config.train.steps, config.train.batch_size) == (9, 3)
    assert config.optimizer.learning_rate == Config().optimizer.learning_rate


def test_prompts_may_hold_commas_and_come_one_a_flag():
    config = parse("--sample.prompts", "fox, ink drawing", "--sample.prompts", 'a "b", c')
    assert config.sample.prompts == ["fox, ink drawing", 'a "b", c']


def test_yaml_out_reads_back_the_same():
    config = parse("--optimizer.learning_rate", "3e-4", "--adapter.exclude", "*.attn1.*")
    assert config_from_values(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.stps", "4"], "Did you mean '--train.steps'"),
        (["--train.steps"], "expected one argument"),
        (["--sample.scales", "[0,"], "A flag's value cannot be read"),
        (["--train.steps", "many"], "'train.steps' is 'many'"),
        (["--train.steps", "0"], "'train.steps' is '0'.*greater than or equal to 1"),
        (["--optimizer.learning_rate", "nan"], "finite"),
        (["--data.resolution_px", "100"], "multiple of 8"),
        (["--output.name", "../x"], "'output.name' is '../x': a name has 1 to 64 letters"),
        (["--output.name", "n" * 65], "a name has 1 to 64 letters"),
        (["--output.name", "con"], "device name"),
        (["--config", "nowhere.yaml"], "There is no config file 'nowhere.yaml'"),
        (["--config", "a.yaml", "--like", "b.safetensors"], "one of --config, --like and --resume"),
        (["--allow-change", "data"], "give --resume, too"),
        (
            ["--adapter.dora", "input", "--adapter.up_bias"],
            "'adapter': dora has no bias of its own: turn dora or up_bias off",
        ),
    ],
)
def test_a_wrong_flag_is_a_sentence(argv, said):
    with pytest.raises(ConfigError, match=said):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {learning_rat: 1}", "Did you mean 'optimizer.learning_rate'"),
        ("trian: {steps: 1}", "There is no setting 'trian'. Did you mean 'train'"),
        ("train: 3", "'train' is 3"),
        ("- a list", "must hold groups"),
        ("train: {", "not valid YAML"),
        ("train: {steps: 3, steps: 2}", "'steps' is given twice"),
        ("1: x", "there is no setting '1'"),
        ("_cli_parse_args: true", "there is no setting '_cli_parse_args'"),
        ("train: {steps: \x07}", "not valid YAML"),
        ("a: 2020-13-45", "cannot be read as settings"),
        ("sample: {scales: [.inf]}", "'sample.scales.0'.*finite"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse("--config", str(file))


def test_a_file_that_is_not_text_is_a_sentence(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x80\x81")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        parse("--config", str(tmp_path / "c.yaml"))


def test_every_setting_has_a_sentence_of_help():
    assert [name for name, field in settings() if len(field.description or "") < 15] == []


def test_help_comes_at_once_and_names_every_flag():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train_sd_lora.py", "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0 and time.monotonic() - started < 5
    assert [name for name, _ in settings() if f"--{name}" not in done.stdout] == []


def test_folders_take_over_what_they_do_not_say_themselves():
    config = config_from_values(
        {
            "data": {
                "folder": "cats",
                "trigger_word": "sks",
                "caption_prefix": "old",
                "flip": True,
                "resolution_px": 512,
                "folders": [
                    {"folder": "more", "flip": False, "repeats": 0.5},
                    {"folder": "any", "kind": "regularisation", "caption_prefix": "new"},
                ],
            }
        }
    )
    cats, more, prior = (FolderOptions(**one) for one in config.data.folder_options())
    assert (cats.trigger_word, cats.flip, cats.resolution_px) == ("sks", True, (512,))
    assert (more.trigger_word, more.flip, more.repeats) == ("sks", False, 0.5)
    # What calls the subject is not taken over by pictures of something else.
    assert (prior.trigger_word, prior.caption_prefix, prior.flip) == (None, "new", True)
    again = config_from_values(yaml.safe_load(config.to_yaml()))
    assert again.data.folder_options() == config.data.folder_options()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"folders": [{"folder": "a", "kind": "validation"}]}, "no folder is of kind 'training'"),
        ({"folders": [{"folder": "a", "class_pictures": 5}]}, "kind: regularisation"),
        ({"folders": [{"folder": "a", "flipp": True}]}, r"'flipp' of folder 1 .*mean 'flip'\?"),
        ({"folders": ["a"]}, r"'folder 1' in 'data\.folders' is 'a'.*folder: more"),
        ({"repeats": 2}, "Each of 'data.folders' has a 'repeats'"),
        ({"resolution_px": [512, 512]}, "named twice.*kohya"),
        ({"resolution_px": []}, "resolution_px"),
        ({"resolution_px": [512, 500]}, "multiple of 8"),
    ],
)
def test_folders_that_make_no_sense_are_said(data, said):
    with pytest.raises(ConfigError, match=said):
        config_from_values({"data": data})


def test_a_folder_of_its_own_can_be_a_flag():
    line = parse_command_line(["--data.folders", '{"folder": "a b", "repeats": 3}'], "x")
    config = config_from_values(line.over({}))
    assert config.data.folder is None and config.data.folders[0].repeats == 3
    assert config_from_values({}).data.folder == "assets/ink-icons"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {name: prodigy}", "set it to 1"),
        ("optimizer: {name: adamw_schedulefree}", "set it to constant"),
        ("optimizer: {name: adamw_schedulefree, schedule: constant, max_weight_norm: 1}", "second"),
        (
            "{optimizer: {name: adamw_schedulefree, schedule: constant}, train: {ema_decay: 0.9}}",
            "optimizer.name adamw_schedulefree averages by itself",
        ),
        (
            "{adapter: {init: pissa}, optimizer: {max_weight_norm: 1}}",
            "adapter.init pissa starts with",
        ),
        ("objective: {noise_offset: 0.1, multires_noise_iterations: 6}", "do the same"),
        ("objective: {timesteps: biased}", "which wants one"),
        ("objective: {logit_mean: 1}", "go with timesteps logit_normal"),
        ("objective: {min_timestep: 5, max_timestep: 4}", "max_timestep is below"),
    ],
)
def test_settings_that_do_not_go_together_are_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_values(yaml.safe_load(text))
