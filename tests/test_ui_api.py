"""The API as programs use it: through gradio_client, over HTTP."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from lora_sd.config import settings
from lora_sd.run_folder import RunFolder
from lora_sd.ui.api import NAMES, NOT_BY_SETTING, PATHS
from tests.ui_app import Served, served

SHORT = {
    "train.steps": 3, "train.batch_size": 1, "sample.every_steps": 0, "sample.scales": [0, 1],
    "sample.steps": 1, "sample.prompts": ["fox, ink drawing"],
}  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("api") / "outputs") as app:
        yield app
    for run in app.outputs.glob("*/status.json"):
        status = RunFolder(run.parent).read_status()
        if status and status.is_alive():
            psutil.Process(status.pid).kill()


@pytest.fixture(scope="module")
def client(app: Served, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(
        str(app.client.base_url), download_files=tmp_path_factory.mktemp("got"), verbose=False
    )


def test_only_the_api_is_public(client: Client) -> None:
    shown = client.view_api(return_format="dict")
    assert set(shown["named_endpoints"]) == {f"/{name}" for name in NAMES}
    assert shown["unnamed_endpoints"] == {}


def test_train_look_generate_download(app: Served, client: Client) -> None:
    assert client.predict(api_name="/status")["data_sets"][0] == "example/ink-icons"
    answer = client.predict("example/ink-icons", SHORT, api_name="/train")
    assert answer == {"run": "ink-icons", "place": 0}
    run = answer["run"]
    until = time.monotonic() + 200
    while (found := client.predict(run, api_name="/status"))["state"] != "finished":
        assert time.monotonic() < until and found["state"] != "failed", found
        time.sleep(0.5)
    assert (found["step"], found["steps"]) == (3, 3)
    all_of_it = client.predict(api_name="/status")
    assert all_of_it["runs"] == [run] and run in all_of_it["adapters"]
    assert all_of_it["training"] in (run, None)  # its process may be ending

    file = client.predict(run, api_name="/download")
    assert Path(file).read_bytes() == (app.outputs / run / "adapter.safetensors").read_bytes()
    wishes = {"seed": 3, "steps": 1}
    on = Image.open(client.predict(run, "fox", scale=1.0, **wishes, api_name="/generate"))
    off = Image.open(client.predict(run, "fox", scale=0.0, **wishes, api_name="/generate"))
    assert on.size == off.size and on.tobytes() != off.tobytes()
    assert json.loads(on.info["lora_sd"])["prompt"] == "fox"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", ["mine/none"], "data set|folder"),
        ("train", ["/etc"], "data set|folder"),
        ("train", ["example/ink-icons", {"train.stps": 1}], "Did you mean 'train.steps'"),
        ("train", ["example/ink-icons", {"train.steps": 0}], "train.steps"),
        ("train", ["example/ink-icons", {"steps": 1}], "write it as"),
        ("train", ["example/ink-icons", [1]], "values by name"),
        ("train", ["example/ink-icons", {}, "tiny-sd", "../up"], "name"),
        ("train", ["example/ink-icons", {}, "/etc/passwd"], "."),
        ("status", ["none"], "no run 'none'"),
        ("status", [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "text"),
        ("generate", ["none", "fox"], "adapter"),
        ("download", ["../ink-icons"], "adapter"),
        ("download", [None], "adapter"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    app: Served, client: Client, name: str, arguments: list[object], words: str
) -> None:
    before = sorted(app.outputs.glob("*"))
    with pytest.raises(AppError, match=words) as raised:
        client.predict(*arguments, api_name=f"/{name}")
    assert str(app.outputs) not in str(raised.value)
    assert sorted(app.outputs.glob("*")) == before


def test_no_setting_that_holds_a_path_can_be_sent(client: Client) -> None:
    own = NOT_BY_SETTING | PATHS
    assert {name for name, _ in settings() if "folder" in name or "file" in name} <= own
    for name in own:
        with pytest.raises(AppError, match="is the app's own"):
            client.predict("example/ink-icons", {name: "x"}, api_name="/train")
