"""The app's API, for programs: train, status, generate, download.

    from gradio_client import Client

    app = Client("http://127.0.0.1:7860")  # auth=("any", password) where there is a password
    run = app.predict("example/ink-icons", {"train.steps": 200}, api_name="/train")["run"]
    app.predict(run, api_name="/status")["state"]  # 'training', then 'finished'
    picture = app.predict(run, "fox, ink drawing", scale=0.8, api_name="/generate")
    file = app.predict(run, api_name="/download")

Data sets, runs and adapters go by the ids that `status` lists, never by path. What cannot be done
is a `gradio_client.exceptions.AppError` with its sentences. All other events of the page are its
own business: they may change at any time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from lora_sd.config import config_from_values, read_yaml
from lora_sd.data.report.base_facts import family_by_name
from lora_sd.errors import ConfigError, UserError
from lora_sd.run_folder import list_runs
from lora_sd.ui.adapters.offered import download_copy, find_adapter, offered_adapters
from lora_sd.ui.bases import find_base, find_vae
from lora_sd.ui.data.pictures import find_folder, offered_folders
from lora_sd.ui.families import CONFIGS
from lora_sd.ui.generate.handlers import GenerateHandlers
from lora_sd.ui.workplace import Workplace

NAMES = ("train", "status", "generate", "download")
NOT_BY_SETTING = {"base.model", "data.folder", "output.name"}  # have arguments of their own
# Paths on this machine: no program outside it has any business with them.
PATHS = {"data.folders", "data.cache_folder", "sample.prompt_file", "output.folder"}
MOST_TEXT = 20_000  # characters of a setting


class Api:
    """What programs can ask for, by the handlers that the page's own events call.

    Args:
        place: what all tabs work on.
        generating: the Generate tab's handlers.
    """

    def __init__(self, place: Workplace, generating: GenerateHandlers) -> None:
        self._place = place
        self._generating = generating

    def offer(self) -> None:
        """Make the page that is being built answer to the names."""
        gr.api(self.train, api_name="train", concurrency_id="trainer")
        gr.api(self.status, api_name="status", concurrency_limit=None)
        gr.api(self.generate, api_name="generate", concurrency_id="pipeline")
        gr.api(self.download, api_name="download", concurrency_id="api")

    def train(
        self,
        data_set: str,
        settings: dict[str, Any] = {},  # noqa: B006  never changed; Gradio shows it
        base: str = "tiny-sd",
        name: str = "",
    ) -> dict[str, Any]:
        """Start a training run, or put it into the queue while another one is at work.

        Args:
            data_set: its id: 'example/ink-icons', 'mine/...'.
            settings: values by setting, as in a config file: {"train.steps": 200}. What is not
                named is as the base's shipped config has it.
            base: the base model: one that the page offers, or another of Hugging Face's hub.
            name: of the run; without one it is named as the data set.

        Returns:
            'run': its name; 'place': 0 where it was started, else its place in the queue.
        """
        with _said():
            folder = find_folder(self._place.outputs, self._place.pictures, data_set)
            base, name, given = _text(base), _text(name), _checked(settings)
            values = read_yaml(CONFIGS[base if base in CONFIGS else family_by_name(base)])
            own: dict[str, Any] = {
                "base.model": find_base(self._place.models, base),
                "data.folder": str(folder.path),
                "output.folder": str(self._place.outputs),
                "output.name": name or self._place.queue.free_name(folder.path.name),
            }
            if "base.vae" in given:
                own["base.vae"] = find_vae(self._place.models, given["base.vae"])
            for key, value in {**given, **own}.items():
                group, _, setting = key.partition(".")
                values.setdefault(group, {})[setting] = value
            config = config_from_values(values)
            submitted = self._place.queue.submit(config)
        return {"run": submitted.run, "place": submitted.place}

    def status(self, run: str = "") -> dict[str, Any]:
        """How a run is getting on; without a run, what there is.

        Returns:
            Of a run: 'state' ('starting', 'training', 'paused', 'finished', 'stopped', 'failed',
            'interrupted'...), 'step', 'steps' and 'message'. Without one: 'training' (the run at
            work, or null), and lists of ids: 'queue', 'runs', 'adapters', 'data_sets'.
        """
        place = self._place
        queued = [entry.run for entry in place.queue.state().entries]
        if not run:
            return {
                "training": place.trainer.current(),
                "queue": queued,
                "runs": [found.name for found in list_runs(place.outputs)],
                "adapters": [found.id for found in offered_adapters(place.outputs)],
                "data_sets": [f.id for f in offered_folders(place.outputs, place.pictures)],
            }
        with _said():
            name = _text(run)
        known = {found.name: found for found in list_runs(place.outputs)}
        status = known[name].read_status() if name in known else None
        said = {"run": name, "step": 0, "steps": 0, "message": ""}
        if status:
            said |= {"step": status.step, "steps": status.steps, "message": status.message}
        if name in queued:
            state = "queued"
        elif place.trainer.is_starting(name):
            state = "starting"
        elif status:
            state = "interrupted" if status.is_interrupted() else status.state
        elif problems := place.trainer.console_errors(name) if name in known else []:
            state, said["message"] = "failed", " ".join(problems)
        else:
            raise gr.Error(f"There is no run '{name[:64]}'.", print_exception=False)
        return said | {"state": state}

    def generate(
        self,
        adapter: str,
        prompt: str,
        negative: str = "",
        scale: float = 1.0,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 7.5,
        base: str = "",
    ) -> gr.FileData:
        """Draw one picture with an adapter.

        Args:
            adapter: its id, as `status` lists it: a run's name, or 'upload:...'.
            prompt, negative: what to draw, and what not.
            scale: of the adapter: 1 as trained, 0 off.
            seed, steps, guidance: of the drawing.
            base: the base model of an uploaded adapter; a run's own is known.

        Returns:
            A PNG file that holds these settings.
        """
        with _said():
            wish = self._generating.request(
                {
                    "adapter": adapter, "prompt": prompt, "negative": negative, "scale": scale,
                    "seed": seed, "steps": steps, "guidance": guidance, "base": base,
                }
            )  # fmt: skip
            picture = self._generating.picture(wish, lambda done, of: False)
        cache = os.environ["GRADIO_TEMP_DIR"]
        return _sent(Path(save_pil_to_cache(picture, cache, name="picture", format="png")))

    def download(self, adapter: str) -> gr.FileData:
        """An adapter's file, as it was trained or uploaded."""
        with _said():
            return _sent(download_copy(find_adapter(self._place.outputs, adapter)))


def keep_private(page: gr.Blocks) -> None:
    """Leave the page's own events out of the API."""
    for event in page.fns.values():
        if event.api_name not in NAMES:
            event.api_visibility = "private"


@contextmanager
def _said() -> Iterator[None]:
    """What a user caused, as the sentences that a client gets."""
    try:
        yield
    except UserError as error:
        raise gr.Error(" ".join(error.problems), print_exception=False) from None


def _sent(file: Path) -> dict[str, Any]:
    """A file in Gradio's folder as an answer."""
    return gr.FileData(path=str(file), orig_name=file.name).model_dump()


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MOST_TEXT or "\0" in value:
        raise ConfigError(f"A name must be text of at most {MOST_TEXT:,} characters.")
    return value.strip()


def _checked(settings: object) -> dict[str, Any]:
    """Settings that may be sent; what they hold, the configuration checks."""
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ConfigError('The settings must be values by name, as {"train.steps": 200}.')
    problems = [
        f"'{name[:64]}' is the app's own." for name in settings if name in NOT_BY_SETTING | PATHS
    ]
    problems += [
        f"'{name[:64]}' is no setting: write it as 'train.steps'."
        for name in settings
        if name.count(".") != 1
    ]
    if len(str(settings)) > MOST_TEXT:
        problems.append(f"The settings are longer than {MOST_TEXT:,} characters.")
    if problems:
        raise ConfigError(problems)
    return settings
