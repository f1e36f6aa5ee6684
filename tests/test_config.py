"""Every configuration that is shipped parses; unknown settings are errors; what is saved reads back the same."""

import dataclasses

import pytest
import yaml
from conftest import DEBUG, ROOT

from ldm.config import RunConfig, differences, load_config, make_parser, parse_config, to_dict, to_yaml

RUNS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if "run_dir" in p.read_text() and "unet" in p.read_text())


def parse(*words: str) -> RunConfig:
    return parse_config(list(words), prog="ldm/train.py", description="")


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_config_parses_and_its_resolved_form_reads_back_the_same(path, tmp_path):
    config = parse(f"--config={path}")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "resolved.yaml")
    assert to_dict(again) == to_dict(config)
    assert differences(to_dict(config), yaml.safe_load(to_yaml(config))) == []


def test_the_configs_that_users_rely_on_are_there():
    assert {"demo", "debug", "sd15", "sd21", "sdxl", "finetune_sd15"} <= {p.stem for p in RUNS}


def test_stable_diffusion_configs_train_epsilon_on_epsilon():
    for name in ("sd15", "sd21", "sdxl", "finetune_sd15"):
        objective = parse(f"--config={ROOT / 'configs' / name}.yaml").objective
        assert (objective.parameterization, objective.loss) == ("epsilon", "epsilon")


def test_the_flow_matching_config_is_that_of_stable_diffusion_but_for_noise_and_objective():
    ours, epsilon = (to_dict(parse(f"--config={ROOT / 'configs' / name}.yaml")) for name in ("sd15_flow", "sd15"))
    assert {one.split(".")[0].split(":")[0] for one in differences(epsilon, ours)} == {"continuous_noise", "objective"}
    objective = parse(f"--config={ROOT / 'configs/sd15_flow.yaml'}").objective
    assert (objective.parameterization, objective.loss, objective.weight) == ("flow", "flow", "uniform")
    edm = ["--continuous_noise.kind=edm", "--objective.timestep_sampling=log_normal"]
    edm += [f"--objective.{name}=edm" for name in ("parameterization", "loss", "weight")]
    assert parse(f"--config={ROOT / 'configs/sd15_flow.yaml'}", *edm).continuous_noise.kind == "edm"


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line():
    config = parse(f"--config={DEBUG}", "--training.steps=7", "--run_dir=elsewhere")
    assert config.optimizer.beta1 == 0.9
    assert config.training.global_batch == 16
    assert (config.training.steps, config.run_dir) == (7, "elsewhere")


@pytest.mark.parametrize("word", ["--training.stepz=7", "--unet.layer_per_block=1", "--colour=red"])
def test_an_unknown_setting_on_the_command_line_is_an_error_that_names_it(word, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(f"--config={DEBUG}", word)
    assert stop.value.code == 2
    assert word.split("=")[0].lstrip("-").split(".")[-1] in capsys.readouterr().err


@pytest.mark.parametrize(("part", "name"), [(None, "lerning"), ("optimizer", "learning_rate"), ("data", "shard")])
def test_an_unknown_setting_in_the_file_is_an_error_that_names_it(part, name, tmp_path, capsys):
    content = yaml.safe_load(DEBUG.read_text())
    (content if part is None else content[part])[name] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stop:
        parse(f"--config={tmp_path / 'run.yaml'}")
    assert stop.value.code == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--optimizer.warmup_steps=21", "optimizer.warmup_steps is 21, but training.steps only 20"),
        ("--ema.decay=1.5", "ema.decay: found 1.5"),
        ("--data.caption_dropout=2", "data.caption_dropout is 2"),
        ("--objective.parameterization=noise", "parameterization"),
        ("--previews.sampler=dpm", "previews.sampler: found 'dpm'"),
        ("--noise.rescale_betas_zero_snr=true", "found 'epsilon' with zero terminal SNR"),
        ("--objective.parameterization=flow", "found 'flow', expected epsilon, v or x0"),
        ("--continuous_noise.kind=vp", "continuous_noise.kind: found 'vp', expected 'flow' or 'edm'"),
        ("--continuous_noise.kind=flow", "found 'epsilon' with continuous_noise.kind flow, expected flow or x0"),
        ("--continuous_noise.kind=edm", "found 'epsilon' with continuous_noise.kind edm, expected edm"),
        (
            "--continuous_noise.kind=flow --objective.parameterization=flow --continuous_noise.sigma_max=50",
            "continuous_noise.sigma_max: found 50 with kind flow, expected it unset",
        ),
        (
            "--continuous_noise.kind=flow --objective.parameterization=flow --noise.beta_end=0.02",
            "noise, continuous_noise: found both, expected one",
        ),
        ("--previews.sampler=analytic_dpm", "previews.sampler: found 'analytic_dpm'"),
        ("--empty_caption=zeros", "empty_caption: found zeros, expected encoded for one encoder"),
        ("--init_from=", "init_from: empty, expected a folder"),
        ("--autoencoder=", "autoencoder: empty, expected a folder"),
        ("--text_encoder_2.source=a", "text_encoder.layer: found last, expected penultimate_without_norm"),
    ],
)
def test_an_impossible_value_ends_with_status_2_and_says_what_is_allowed(word, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(f"--config={DEBUG}", *word.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_comments_of_the_fine_tuning_config_name_the_settings_that_hold_the_hubs_name():
    path = ROOT / "configs/finetune_sd15.yaml"
    (words,) = [line.split("#")[1].split() for line in path.read_text().splitlines() if "--init_from" in line]
    config = parse(f"--config={path}", *words)
    assert (config.init_from, config.autoencoder, config.text_encoder.source) == ("sd15",) * 3
    assert "stable-diffusion-v1-5/" not in to_yaml(config)


def test_help_explains_every_setting():
    parser = make_parser("ldm/train.py", "")
    text = " ".join(parser.format_help().split())
    for part in dataclasses.fields(RunConfig):
        kind = part.type
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else []
        assert f"--{part.name}" in text
        for one in fields:
            assert f"--{part.name}.{one.name} " in text, one.name
    undocumented = [a.dest for a in parser._actions if a.help in (None, "") and a.dest not in ("help",)]
    assert undocumented == []


def test_only_what_makes_another_run_counts_as_a_difference():
    config = to_dict(parse(f"--config={DEBUG}"))
    other = to_dict(parse(f"--config={DEBUG}", "--training.steps=99", "--data.workers=3", "--metrics.log_every=5"))
    assert differences(config, other) == []
    other = to_dict(parse(f"--config={DEBUG}", "--data.flip=0.5", "--training.global_batch=8"))
    assert differences(config, other) == ["data.flip: 0.0 -> 0.5", "training.global_batch: 16 -> 8"]
    assert differences(config, to_dict(parse(f"--config={DEBUG}", "--card.title=Emoji"))) == []
    other = to_dict(parse(f"--config={DEBUG}", "--init_from=owner/model"))
    assert differences(config, other) == ["init_from: None -> owner/model"]
