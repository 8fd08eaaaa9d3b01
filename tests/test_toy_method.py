"""A third method needs a loss, a configuration class, a method, a YAML and a line in each registry."""

import json

import pytest
import yaml

from ssl_vit.cli import main
from ssl_vit.config.methods import METHOD_CONFIGS
from ssl_vit.methods import METHODS
from ssl_vit.runtime.shipped_files import conf_dir
from tests.conftest import SHRUNK
from tests.helpers.cli import state
from tests.helpers.toy_method import Toy, ToyConfig


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The toy method, registered; returns the option that finds its YAML."""
    monkeypatch.setitem(METHOD_CONFIGS, "toy", ToyConfig)
    monkeypatch.setitem(METHODS, "toy", Toy)
    shared = yaml.safe_load((conf_dir() / "method" / "sit.yaml").read_text())
    section = {"name": "toy", "views": shared["views"], "std_weight": 1.0, "optimizer": shared["optimizer"]}
    path = tmp_path / "conf" / "method" / "toy.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(section))
    return f"--config-dir={tmp_path / 'conf'}"


def test_toy_method_trains_resumes_and_is_measured(toy, sample, tmp_path, stop_at, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain = ["pretrain", toy, "method=toy", *SHRUNK, f"data.root={sample / 'train'}", "run.folder=runs"]
    pretrain += ["run.name=toy", "image_logging.every_epochs=1", "image_logging.num_images=2"]
    with stop_at(2):
        assert main(pretrain) == 0
    assert main([*pretrain, "run.resume=true"]) == 0
    run = tmp_path / "runs" / "toy"
    assert state(run)[1] == 4

    assert main([*pretrain, "method.std_wieght=2"]) == 2
    assert "method.std_wieght: unknown key; the nearest valid one is method.std_weight" in capsys.readouterr().err

    measured = [word for word in SHRUNK if not word.startswith(("online.", "image_logging."))]
    assert main(["bench", toy, "method=toy", *measured, f"data.root={sample / 'train'}", "seconds=0.1"]) == 0
    flops = json.loads((tmp_path / "bench.json").read_text())["measured"][0]["flops_per_image"]
    assert flops == {"student": flops["total"], "heads": 0, "total": flops["total"]}

    assert main(["knn", "checkpoint=runs/toy", f"data.root={sample}", "k=[5]", "data.num_workers=0"]) == 0
    assert main(["report", "run=runs/toy", "inspect=false", "limit=2"]) == 0
    page = (run / "report.html").read_text()
    assert "Toy" in page
    assert "knn" in page
