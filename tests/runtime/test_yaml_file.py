"""Tests of YAML files that are damaged or hostile: each ends at once, in a ValueError."""

import pytest
import yaml

from ssl_vit.cli import main
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.runtime.yaml_file import read_yaml

BOMB = "a0: &a0 {a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8, i: 9}\n" + "".join(
    f"a{i}: &a{i} {{{','.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 9)
)
HOSTILE = {
    "alias bomb": BOMB,
    "list bomb": "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else '1'] * 9)}]\n" for i in range(9)),
    "cycle": "a: &a [*a]\n",
    "deep": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "long integer": f"a: {'9' * 6000}\n",
    "large": f"a: '{'x' * 10**6}'\n",
    "tag": "a: !!python/name:os.system x\n",
    "list as key": "[1, 2]: 3\n? {a: 1}\n: 2\n",
    "no text": "a: \x00\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_read_yaml_refuses(tmp_path, name):
    (tmp_path / "x.yaml").write_text(HOSTILE[name])
    with pytest.raises(ValueError):
        read_yaml(tmp_path / "x.yaml")


def test_read_yaml_reads_plain_values_and_aliases(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {b: [1, 2]}\nc: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_run_config_that_is_hostile_ends_every_command_at_once(
    pretrain_config, pretrain_words, tmp_path, sample, capsys
):
    run = pretrain(pretrain_config())
    good = (run / "config.yaml").read_text()
    values = yaml.safe_load(good)
    texts = [good + text for text in HOSTILE.values()]
    for value in ("many", -3, "9" * 6000, [1]):
        values["trainer"]["max_epochs"] = value
        texts.append(yaml.safe_dump(values))
    for text in texts:
        (run / "config.yaml").write_text(text)
        assert main(["pretrain", *pretrain_words("run.resume=true")]) == 2
        assert "config.yaml is damaged" in capsys.readouterr().err
    words = [f"checkpoint={run}", f"data.root={sample / 'test'}", "baselines=false", f"out={tmp_path / 'x.json'}"]
    (run / "config.yaml").write_text(good + BOMB)
    assert main(["knn", *words]) == 0


def test_recipe_with_an_alias_bomb_is_refused(pretrain_words, tmp_path, capsys):
    (tmp_path / "own" / "recipes").mkdir(parents=True)
    (tmp_path / "own" / "recipes" / "mine.yaml").write_text("# @package _global_\n" + BOMB)
    assert main(["pretrain", *pretrain_words(f"--config-dir={tmp_path / 'own'}", "recipe=mine")]) == 2
    assert "when its aliases are followed" in capsys.readouterr().err
