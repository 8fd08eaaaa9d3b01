"""tools/gpu_report.py on a CPU: measurements and failures are written and printed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_benchmarks
import pytest
from gpu_report import table

TOOL = Path(__file__).with_name("gpu_report.py")
NEEDS_GPU = ["cifar 512 CUDA graphs", "check sync", "check waits"]
SOME = ["machine", "vit_s full", "cifar 512 K", "cifar 512 C", "check", "sit full", "parts"]


@pytest.mark.slow
def test_gpu_report_writes_and_prints_measurements_and_failures(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(TOOL), str(out), "--budget", "60", "--only", *SOME]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    found = json.loads(out.read_text())
    failed = {name for name, figure in found.items() if "error" in figure}
    assert failed == set(NEEDS_GPU)
    assert all("needs a GPU" in found[name]["error"] for name in failed)
    for name in ("vit_s full", "cifar 512 K=4096", "sit full"):
        assert found[name]["images_per_s"] > 0
        assert 0 < found[name]["peak_share"] < 1
        assert abs(sum(found[name]["shares"].values()) - 1) < 1e-6
    assert found["check graphs"]["dino graphs"] == "5 as expected"
    assert found["check graphs"]["sit graphs"] == "2 as expected"
    assert found["check graphs"]["dino breaks"] == found["check graphs"]["dino renamed keys"] == 0
    assert found["check dino"]["largest difference, device"] == found["check sit"]["largest difference, device"] == 0
    assert all(value > 0 for name, value in found["parts"].items())
    for text in ("1,200 not reached", "data below 5%", "check sync: FAILED: RuntimeError: needs a GPU"):
        assert text in output


def test_main_resumes_after_existing_and_failed_measurements(tmp_path, monkeypatch):
    def measure(name):
        def run(context):
            measured.append(name)
            if name == "slow":
                time.sleep(10)
            if name == "broken":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return {"value": 1.0}

        return gpu_benchmarks.Measurement(0.2, run)

    names = ["done", "slow", "broken", "last"]
    monkeypatch.setattr(gpu_benchmarks, "plan", lambda context: {name: measure(name) for name in names})
    out, measured = tmp_path / "figures.json", []
    out.write_text(json.dumps({"done": {"value": 2.0}}))
    arguments = str(out), str(tmp_path), str(time.time() + 60)
    assert gpu_benchmarks.main(*arguments) == 1
    assert measured == ["slow", "broken"]
    assert gpu_benchmarks.main(*arguments) == 0
    assert measured == ["slow", "broken", "last"]
    found = json.loads(out.read_text())
    assert found["done"] == {"value": 2.0}
    assert "TimeoutError" in found["slow"]["error"]
    assert found["last"]["value"] == 1.0
    assert "broken: FAILED: RuntimeError: CUDA error" in table(found)


def test_table_compares_with_targets():
    values = {
        "images_per_s": 1500.0, "batch": 512, "peak_share": 0.25, "memory": {"device_gb": 90.0},
        "shares": {"data": 0.02, "loss": 0.03, "ema": 0.01, "optimizer": 0.01, "clip": 0.01, "backward": 0.92},
        "parts_ms": {"data": 2.0},
    }  # fmt: skip
    output = table({"vit_s full": values})
    for text in ("1,200 reached", "1,471 reached", "2,150 not reached", "data below 5% yes", "clip below 5% NO"):
        assert text in output
